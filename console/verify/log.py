"""launch.log held against the stream: the same steps, the same losses."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from console.verify.claims import Claim, differs, same, untold
from console.verify.fold import Attempt, Fold
from dispatch.sums import Progress
from engine.falsifiers import FIRST_PHASE
from engine.human import human_lines
from engine.stream import Phase, Step

LOG = "launch.log"
_STEP = re.compile(rb" {2}Step ([0-9]{1,18})/[0-9]+: loss: (\S{1,40})\n?\Z")
"""At the end of a line: a dump of stacks may stand before it, cut off where the step was printed."""
_LINE_BYTES = 1 << 16
_PROGRESS_LINES = 4096


@dataclass
class _Printed:
    """The step lines of one attempt, held against its events as they come."""

    count: int = 0
    wrong: str = ""
    extra: int = 0
    """Printed steps that the stream does not have."""


def log_claims(directory: Path, fold: Fold, progress: Progress) -> Iterator[Claim]:
    """Whether launch.log, as it was printed, has the steps of the stream and their losses to four digits.

    A process that was killed may have said one step less than it wrote, and a machine that went down may have lost the
    end of either file: that is told, and no difference.
    """
    try:
        descriptor = os.open(directory / LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    printed: list[_Printed] = []
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        opening = "".join(human_lines(Phase(name=FIRST_PHASE), None)).encode()
        read = number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            read += len(line)
            if number % _PROGRESS_LINES == 0:
                progress(LOG, read)
                read = 0
            said = line.rstrip(b"\n")
            if said.endswith(opening) and not said.endswith(b" " + opening):  # half a line of a killed one before it
                printed.append(_Printed())
            elif printed and (found := _STEP.search(line)) is not None and len(printed) <= len(fold.attempts):
                _hold(fold.attempts[len(printed) - 1], printed[-1], int(found[1]), found[2].decode("ascii", "replace"))
    yield from _claims(fold, printed)


def _hold(attempt: Attempt, printed: _Printed, step: int, loss: str) -> None:
    at = printed.count
    printed.count += 1
    if at >= len(attempt.steps):
        printed.extra += 1
        return
    wanted = _said(attempt, at)
    if (attempt.steps[at], wanted) != (step, loss) and not printed.wrong:
        printed.wrong = f"step {step}, loss {loss}, where the stream has step {attempt.steps[at]}, loss {wanted}"


def _said(attempt: Attempt, at: int) -> str:
    """The loss as the engine prints it."""
    step = Step(step=0, loss=attempt.losses[at], ce=0.0, kd=0.0, lr=0.0, grad_norm=0.0, tokens=0, seconds=0.0)
    return human_lines(step, None)[0].rpartition(" ")[2]


def _claims(fold: Fold, printed: list[_Printed]) -> Iterator[Claim]:
    name = f"{LOG}: steps and losses"
    lines = sum(each.count for each in printed)
    made = sum(len(attempt.steps) for attempt in fold.attempts)
    stated, found = f"{lines:,} lines", f"{made:,} events"
    if not lines and not made:
        return
    if len(printed) != len(fold.attempts):
        why = f"{len(printed)} attempts are printed, the stream has {len(fold.attempts)}"
        sure = all(attempt.end is not None and not attempt.disk for attempt in fold.attempts)
        missing = sure and len(printed) < len(fold.attempts)
        yield differs("log", name, stated, found, f"{LOG}: {why}") if missing else untold("log", name, stated, why)
        return
    problems: list[str] = []
    gaps: list[str] = []
    for number, attempt in enumerate(fold.attempts, 1):
        each = printed[number - 1]
        short = len(attempt.steps) - each.count
        ended = attempt.end is not None
        where = f"attempt {number}: "
        if each.wrong:
            (gaps if attempt.disk else problems).append(where + each.wrong)
        elif short or each.extra:
            told = f"{where}{each.count:,} steps are printed, the stream has {len(attempt.steps):,}"
            (gaps if attempt.disk or not ended else problems).append(told)
    if problems:
        yield differs("log", name, stated, found, f"{LOG}: {'; '.join(problems[:3])}")
    elif gaps:
        yield untold("log", name, stated, f"{'; '.join(gaps[:3])}; the process ended, or the disk was full, in between")
    else:
        yield same("log", name, stated, found)
