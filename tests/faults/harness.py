"""Does every fault for real, and prints how often each was survived and what it cost.

    python tests/faults/harness.py [--kills N] [--command-kills N] [--seed S] [--only PART] [--json]

Three parts: `children` kills processes that are forked from this one, which has torch loaded; `files` damages files and
fills disks of a small training in this process; `command` kills and troubles `kdconsole --headless train`, and signals
its engine in every phase.

A fault is survived when no checkpoint that was reported is lost or damaged, the run ends in a correct model or in one
clear error, and going on ends bit by bit as the undisturbed training did. Exit code 1: one was not. Progress goes to
standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))
sys.path.insert(0, str(Path(__file__).absolute().parents[1] / "engine"))

import checkpoint_damage
import checkpoint_kills
import command_faults
from command_faults import EARLY, LATE
from command_rig import Training, end_all
from faults import can_make_read_only, can_mount
from tally import Tally, table

from tests.console_rig import write_corpus
from tests.nursery import Nursery

PARTS = ("children", "files", "command")


class Report:
    """The rows, in the order in which they are begun, and what went wrong."""

    def __init__(self) -> None:
        self.rows: list[Tally] = []
        self.problems: list[str] = []
        self._began = time.monotonic()

    def row(self, fault: str) -> Tally:
        self.rows.append(Tally(fault))
        return self.rows[-1]

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Whatever happens inside is told and remembered, and the next fault is done."""
        self.tell(what)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - an unforeseen end of one fault must not hide the others
            traceback.print_exc()
            self.problems.append(f"{what}: {error}")

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.problems and all(row.ok for row in self.rows)


def children(report: Report, root: Path, kills: int, seed: int) -> None:
    """SIGKILL to one training after another, all of them one run."""
    anywhere = report.row("SIGKILL of a forked training, at a random moment")
    writing = report.row("SIGKILL of a forked training, while it writes a checkpoint")
    with report.guarded(f"{kills} kills of forked trainings"):
        checkpoint_kills.warm(root)
        checkpoint_kills.at_random(root, kills, seed, anywhere, writing, report.tell)
        check_half(writing, kills)


def check_half(writing: Tally, kills: int) -> None:
    assert 2 * writing.times >= kills, f"only {writing.times} of {kills} kills met a checkpoint in the making"


def files(report: Report, root: Path) -> None:
    """What can be done to files and to a disk."""
    checkpoint_kills.warm(root)
    number = 0
    for kind, damages in checkpoint_damage.DAMAGES.items():
        tally = report.row(kind)
        for name, damage in damages.items():
            number += 1
            with report.guarded(f"{kind}: {name}"), tally.counts():
                tally.cost(checkpoint_damage.damaged(root / f"{number}", damage, checkpoint_damage.cost_of(kind)))
    for kind, troubles in checkpoint_damage.TROUBLES.items():
        if not checkpoint_damage.possible(kind):
            report.tell(f"left out: {kind}, which this user cannot make here")
            continue
        tally = report.row(kind)
        for name, trouble in troubles.items():
            number += 1
            with report.guarded(f"{kind}: {name}"), tally.counts():
                tally.cost(checkpoint_damage.troubled(root / f"{number}", trouble))


def command(report: Report, root: Path, kills: int, seed: int) -> None:
    """Full runs, two at a time."""
    corpus = write_corpus(root / "corpus.txt")
    with contextlib.closing(Nursery()) as nursery, ThreadPoolExecutor(2) as pool:
        calm = pool.submit(command_faults.undisturbed, root / "undisturbed", corpus, nursery)
        jobs: dict[str, Callable[[Report, Path, Path, Future[Training]], None]] = {
            "stopped": partial(_stopped, nursery=nursery),
            "troubled": _troubled,
        }
        if can_mount():
            jobs["full"] = _full
        if kills:
            jobs["killed"] = partial(_killed, kills=kills, seed=seed)
        for name, job in jobs.items():
            pool.submit(job, report, root / name, corpus, calm)


def _stopped(report: Report, root: Path, corpus: Path, calm: Future[Training], nursery: Nursery) -> None:
    signals = report.row(f"SIGTERM or SIGINT in each of {len(EARLY) + len(LATE)} phases")
    second = report.row("a second signal while a checkpoint hangs in the disk")
    unsaved = report.row("a signal while checkpoints are read-only") if can_make_read_only() else None
    with report.guarded("a full run: signals in every phase, and a second one"):
        made = command_faults.stopped(root, corpus, nursery)
        for phase, attempt in made.stops.items():
            with signals.counts():
                command_faults.check_stopped(attempt, phase)
            signals.cost(attempt.lost)
        with second.counts():
            command_faults.check_stopped_twice(made.twice)
        second.cost(made.twice.lost)
        if unsaved and made.unsaved:
            with unsaved.counts():
                command_faults.check_stopped_unsaved(made.unsaved)
            unsaved.cost(made.unsaved.lost)
        _same(made.training, calm, signals, second, *filter(None, [unsaved]))


def _troubled(report: Report, root: Path, corpus: Path, calm: Future[Training]) -> None:
    read_only = report.row("a run directory that becomes read-only") if can_make_read_only() else None
    clock = report.row("a clock that jumps a month ahead and a year back")
    late = report.row("SIGTERM when all is done but the verdicts")
    with report.guarded("the command: a read-only directory, a clock that jumps, a late signal"):
        made = command_faults.troubled(root, corpus)
        if read_only and made.read_only and made.refused:
            with read_only.counts():
                command_faults.check_read_only(made.training, made.read_only)
            with read_only.counts():
                command_faults.check_refused(made.training, made.refused)
            read_only.cost(made.read_only.lost)
        with clock.counts(2):
            command_faults.check_clock(made.training, made.last)
        with late.counts():
            command_faults.check_nothing_left_to_stop(made.last)
        _same(made.training, calm, clock, late, *filter(None, [read_only]))


def _full(report: Report, root: Path, corpus: Path, calm: Future[Training]) -> None:
    tally = report.row("a disk that fills up under the command")
    with report.guarded("the command: a disk that fills up"):
        command_faults.full(root, corpus, tally, calm.result())


def _killed(report: Report, root: Path, corpus: Path, calm: Future[Training], kills: int, seed: int) -> None:
    anywhere = report.row("SIGKILL of the command's engine, at a random moment")
    writing = report.row("SIGKILL of the command's engine, while it writes a checkpoint")
    with report.guarded(f"the command: {kills} kills"):
        training = command_faults.killed(root, corpus, kills, seed, anywhere, writing, report.tell)
        check_half(writing, kills)
        _same(training, calm, anywhere, writing)


def _same(training: Training, calm: Future[Training], *tallies: Tally) -> None:
    """Where the end is not the undisturbed one, none of the faults before it counts as survived."""
    try:
        command_faults.check_same_end(training, calm.result())
    except Exception:
        for tally in tallies:
            tally.survived = 0
        raise


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of forked trainings (20)")
    parser.add_argument("--command-kills", type=int, default=5, metavar="N", help="of the real command (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    parser.add_argument("--only", choices=PARTS, action="append", metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    options = parser.parse_args(argv)
    parts = options.only or PARTS
    report, root = Report(), Path(tempfile.mkdtemp(prefix="kdconsole-faults-"))
    try:
        if "children" in parts and options.kills:  # first: a process that forks must have no threads
            children(report, root / "children", options.kills, options.seed)
        if "files" in parts:
            files(report, root / "files")
        if "command" in parts:
            (root / "command").mkdir()
            command(report, root / "command", options.command_kills, options.seed)
    finally:
        end_all(root)
    report.tell("all survived" if report.ok else f"NOT all survived; see {root}")
    if options.json:
        print(
            json.dumps({"seed": options.seed, "ok": report.ok, "rows": [asdict(row) for row in report.rows]}, indent=2)
        )
    else:
        print(table(report.rows))
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if report.ok:
        shutil.rmtree(root)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
