"""An evaluation proven: scores computed anew from the stream and from its files, which must all tell the same.

No generated code is run here: what became of an answer is taken as the evaluator told it, in the stream and in
results.jsonl, and every figure is made anew from that.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from console.answers import TRUTH, is_off
from console.verify.answer_fold import AnswerFold, Key, answer_name, pass_at
from console.verify.claims import Claim, close, compared, differs, same, untold
from console.verify.faults import MAX_FAULTS, Faults
from console.verify.fold import Fold
from dispatch.manifest import EVENTS, Manifest
from dispatch.sums import Progress
from engine.answers import MAX_LINE_BYTES, Answer, Result
from engine.config import RunConfig
from engine.errors import KdError
from engine.measures import PASS_AT
from engine.problems import COMPLETIONS, PROBLEMS, RESULTS, file_bytes, read_problems
from engine.text import clean

PART: Final = "answers"
_PROGRESS_LINES: Final = 4096
_Row = TypeVar("_Row", Answer, Result)


def answer_claims(
    directory: Path, manifest: Manifest | None, fold: Fold, config: RunConfig | None, progress: Progress
) -> Iterator[Claim]:
    """What an evaluation on problems says, as its controls, its answers and its files make it.

    Args:
        directory: of the run.
        manifest: its own; None where it cannot be read.
        fold: of the whole stream.
        config: its own; None where it cannot be read.
        progress: told how far the reading is.
    """
    told = fold.answers
    if fold.run is None or fold.run.mode != "evaluate":
        return
    if not told.controls and not told.answers and not os.path.lexists(directory / PROBLEMS):
        return
    completed = fold.end is not None and fold.end.status == "COMPLETED"
    yield from _controls(told, completed)
    yield from _figures(told, told.pass_at(), EVENTS, completed)
    remote = manifest is not None and manifest.remote is not None
    faults = Faults()
    yield from _problems(directory, told, config, completed, remote)
    passed: dict[Key, bool] = {}
    for name, held in (
        (RESULTS, _results(directory, told, faults, passed, progress)),
        (COMPLETIONS, _completions(directory, told, faults, progress)),
    ):
        rows = held
        if rows is None:
            made = untold(PART, name, "", "not fetched", essential=True) if remote else None
            if made is None and told.answers:
                made = differs(PART, name, f"{len(told.answers):,} answers", "missing", f"{name} is not here")
            yield from [made] if made is not None else []
            continue
        yield from _named(name, rows, len(told.answers), faults)
    if passed:
        yield from _figures(told, pass_at(passed), RESULTS, completed)


def _controls(told: AnswerFold, completed: bool) -> Iterator[Claim]:
    for name, must in TRUTH.items():
        stated = told.measures.get(f"control_{name}")
        if name not in told.controls:
            if told.answers or completed or stated is not None:
                yield differs(PART, f"control {name}", "tried", "not told", f"{EVENTS}: no control event of this name")
            continue
        event, line = told.controls[name]
        where = f"{EVENTS}: line {line}"
        if stated is not None:
            yield compared(PART, f"control {name}", stated, event.observed, f"{where}: its measure says another score")
        if event.expected != must:
            yield differs(PART, f"control {name} is held against", event.expected, must, where)
        if is_off(event) and (completed or told.answers):
            why = f"{where}: off, and the evaluation went on"
            yield differs(PART, f"control {name} holds", must, event.observed, why)


def _figures(told: AnswerFold, found: dict[int, float], source: str, completed: bool) -> Iterator[Claim]:
    for k in PASS_AT:
        stated = {name: told.measures[name] for name in (f"pass_at_{k}", f"part_pass_at_{k}") if name in told.measures}
        for name, value in stated.items():
            if k in found:
                yield close(PART, f"{name} by {source}", value, found[k])
            else:
                yield differs(PART, f"{name} by {source}", value, "none", f"{source}: too few answers for it")
        if completed and not stated and k in found:
            yield differs(PART, f"pass_at_{k} by {source}", "missing", found[k], f"{EVENTS}: the end without its score")


def _problems(
    directory: Path, told: AnswerFold, config: RunConfig | None, completed: bool, remote: bool
) -> Iterator[Claim]:
    """What was asked: the file that the stream names by its hash, and no answer to anything else."""
    try:
        data = file_bytes(directory / PROBLEMS)
        problems = read_problems(data, PROBLEMS)
    except KdError as error:
        if remote and not os.path.lexists(directory / PROBLEMS):
            yield untold(PART, PROBLEMS, "", "not fetched", essential=True)
        else:
            yield differs(PART, PROBLEMS, "what was asked", "cannot be read", str(error))
        return
    if "problems" in told.digests:
        digest = hashlib.sha256(data).hexdigest()
        yield compared(PART, f"{PROBLEMS} as it was asked", told.digests["problems"], digest, f"{PROBLEMS} is another")
    asked = {problem.task for problem in problems[: config.evaluate.limit if config is not None else None]}
    counted = {event.problems for event, _ in told.controls.values()}
    if counted and config is not None:
        made = same if counted == {len(asked)} else differs
        ran_on = ", ".join(f"{count:,}" for count in sorted(counted))
        yield made(PART, "controls ran on every problem that is asked", ran_on, f"{len(asked):,}")
    foreign = sorted({task for task, _ in told.answers} - asked)
    if foreign:
        why = f"{EVENTS}: {foreign[0]} is not asked by {PROBLEMS}"
        yield differs(PART, "every answer is to a problem that was asked", "all", f"{len(foreign):,} are not", why)
    if len(asked) < len(problems) and any(f"pass_at_{k}" in told.measures for k in PASS_AT):
        why = f"{len(asked):,} of {len(problems):,} problems were asked, and their score is told as that of all"
        yield differs(PART, "a part is not told as the whole suite", "part_pass_at", "pass_at", why)
    if completed and config is not None:
        wanted = len(asked) * config.evaluate.samples
        yield compared(PART, "answers", len(told.answers), wanted, f"{EVENTS}: an answer is missing, or one too many")


def _results(
    directory: Path, told: AnswerFold, faults: Faults, passed: dict[Key, bool], progress: Progress
) -> int | None:
    """Holds every result against its event; the number of lines, None where there is no file."""
    rows = 0
    lines = _rows(directory / RESULTS, Result, faults, progress)
    if lines is None:
        return None
    for number, row in lines:
        rows += 1
        key = clean(row.task, 200), row.sample
        where = f"line {number}: {answer_name(key)}"
        if key in passed:
            faults.add(RESULTS, f"{where} for the second time")
        passed[key] = row.passed
        if row.passed != (row.outcome == "passed"):
            faults.add(RESULTS, f"{where}: passed is {str(row.passed).lower()} and its outcome is {row.outcome}")
        event = told.answers.get(key)
        if event is None:
            faults.add(RESULTS, f"{where}: the stream does not tell of it")
            continue
        held = (
            ("passed", row.passed, event.passed),
            ("outcome", row.outcome, event.outcome),
            ("detail", clean(row.detail, 500), event.detail),
            ("seconds", row.seconds, event.seconds),
        )
        for name, stated, streamed in held:
            if stated != streamed:
                said = f"{name} is {stated}, line {event.line} of the stream says {streamed}"
                faults.add(RESULTS, f"{where}: {clean(said, 200)}")
    for key, event in told.answers.items():
        if key not in passed:
            faults.add(RESULTS, f"{answer_name(key)} is missing, line {event.line} of the stream tells of it")
    return rows


def _completions(directory: Path, told: AnswerFold, faults: Faults, progress: Progress) -> int | None:
    """Holds every answer against its event; an answer that was not judged yet has none."""
    lines = _rows(directory / COMPLETIONS, Answer, faults, progress)
    if lines is None:
        return None
    seen: set[Key] = set()
    for number, row in lines:
        key = clean(row.task, 200), row.sample
        where = f"line {number}: {answer_name(key)}"
        if key in seen:
            faults.add(COMPLETIONS, f"{where} for the second time")
        seen.add(key)
        event = told.answers.get(key)
        if event is not None and event.tokens != row.tokens:
            faults.add(
                COMPLETIONS, f"{where}: {row.tokens:,} tokens, line {event.line} of the stream says {event.tokens:,}"
            )
    for key, event in told.answers.items():
        if key not in seen:
            faults.add(COMPLETIONS, f"{answer_name(key)} is missing, line {event.line} of the stream tells of it")
    return len(seen)


def _rows(path: Path, kind: type[_Row], faults: Faults, progress: Progress) -> Iterator[tuple[int, _Row]] | None:
    """Whole lines of a file with their numbers; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return _decoded(descriptor, path.name, kind, faults, progress)


def _decoded(
    descriptor: int, name: str, kind: type[_Row], faults: Faults, progress: Progress
) -> Iterator[tuple[int, _Row]]:
    decoder = msgspec.json.Decoder(kind)
    read = number = 0
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            read += len(line)
            if number % _PROGRESS_LINES == 0:
                progress(name, read)
                read = 0
            if not line.endswith(b"\n"):
                if len(line) > MAX_LINE_BYTES:
                    faults.add(name, f"line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                    return
                continue  # half a line of a process that was ended: it counts for nothing
            try:
                yield number, decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                faults.add(name, f"line {number}: {clean(str(error), 200)}")


def _named(name: str, rows: int, answers: int, faults: Faults) -> Iterator[Claim]:
    claim = f"{name} tells what the stream tells"
    if name not in faults.counts:
        yield same(PART, claim, f"{rows:,} lines", f"{answers:,} answers")
        return
    for text in faults.named[name]:
        yield differs(PART, claim, "the same", "not so", f"{name}: {text}")
    if faults.counts[name] > MAX_FAULTS:
        yield differs(PART, claim, "the same", "not so", f"and {faults.counts[name] - MAX_FAULTS:,} more")
