"""`python gallery.py`: every incident of docs/incidents.md made for real and caught, and good runs beside them.

Exit code 0: each incident that is not open was caught by name, within a minute, in every way that it was made, and no
good run alarmed anybody. Else 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).absolute().parent))

import refusals
import running
import scored
from gallery_tables import document, machine, markdown, put_between_marks, table
from good_runs import GOOD, Ran, alarms
from scene import Caught, Scene, Way

WORKERS = 2
DOCUMENT = Path(__file__).absolute().parents[2] / "docs" / "incidents.md"

Make = Callable[[Scene], Iterator[Way]]


@dataclass(frozen=True)
class Incident:
    """One line of what really happened, and how it is made again."""

    number: int
    name: str
    make: Make | None
    """None: open, as what it is about is not there yet."""


INCIDENTS = (
    Incident(1, "the exported model was an empty file", running.empty_export),
    Incident(2, "no intermediate checkpoint", running.lost_steps),
    Incident(3, "a run hung at step 0 and said nothing", running.hang),
    Incident(4, "teacher and student were one model", running.one_model),
    Incident(5, "the vocabularies had different sizes", refusals.vocabulary),
    Incident(6, "weights of another format", refusals.foreign_format),
    Incident(7, "flags that the trainer did not have", refusals.unknown_flags),
    Incident(8, "the model did not fit into memory", refusals.too_large),
    Incident(9, "one input with many labels", running.degenerate_batch),
    Incident(10, "a broken model passed HumanEval", scored.broken_evaluator),
    Incident(11, "the disk filled up", running.full_disk),
    Incident(12, "a contract without the code", refusals.empty_claim),
    Incident(13, "a pid was all that was looked at", running.lost_process),
)


@dataclass
class Outcome:
    """How an incident ended."""

    incident: Incident
    ways: list[Way] = field(default_factory=list)
    problem: str = ""
    """Why it was not caught, or not made."""

    @property
    def state(self) -> Literal["caught", "missed", "open"]:
        if self.incident.make is None:
            return "open"
        caught = [way for way in self.ways if isinstance(way, Caught)]
        return "caught" if caught and not self.problem and all(way.in_time for way in caught) else "missed"


@dataclass
class Good:
    """How a good run ended."""

    name: str
    what: str
    seconds: float = 0.0
    alarms: list[str] = field(default_factory=list)


@dataclass
class Gallery:
    """All of it, in the order in which it is told."""

    outcomes: list[Outcome]
    good: list[Good]
    machine: str
    seconds: float = 0.0

    @property
    def caught(self) -> int:
        return sum(outcome.state == "caught" for outcome in self.outcomes)

    @property
    def closed(self) -> int:
        """How many incidents are to be caught."""
        return sum(outcome.state != "open" for outcome in self.outcomes)

    @property
    def false_alarms(self) -> int:
        """How many good runs alarmed somebody."""
        return sum(bool(good.alarms) for good in self.good)

    @property
    def ok(self) -> bool:
        return self.caught == self.closed and not self.false_alarms


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(incident: Incident, root: Path, tell: Callable[[str], None] = say) -> Outcome:
    """Makes an incident in every way that it has; whatever is missing on the way to its catch is its problem.

    Args:
        incident: which.
        root: a directory of its own, made here.
        tell: told how it goes.
    """
    outcome = Outcome(incident)
    if incident.make is None:
        return outcome
    root.mkdir(parents=True)
    scene = Scene(root)
    try:
        for way in incident.make(scene):
            outcome.ways.append(way)
            end = f"{way.by}, {way.seconds:.1f} s" if isinstance(way, Caught) else f"not made: {way.why}"
            tell(f"incident {incident.number}: {way.made}: {end}")
    except Exception as error:  # noqa: BLE001 - whatever goes wrong here, this incident was not seen to be caught
        outcome.problem = f"{type(error).__name__}: {error}"
        tell(f"incident {incident.number} MISSED: {outcome.problem}")
    finally:
        scene.clear()
    return outcome


def run_well(make: Callable[[Scene], Ran], root: Path, tell: Callable[[str], None] = say) -> Good:
    """Makes a good run and collects what would alarm its operator; arguments as of `show`."""
    good = Good(make.__name__, (make.__doc__ or "").strip())
    root.mkdir(parents=True)
    scene = Scene(root)
    began = time.monotonic()
    try:
        good.alarms = alarms(make(scene))
    except Exception as error:  # noqa: BLE001 - a run that could not be made is no good run
        good.alarms = [f"{type(error).__name__}: {error}"]
    finally:
        scene.clear()
    good.seconds = time.monotonic() - began
    tell(f"good: {good.what}: " + ("; ".join(good.alarms) or f"no alarm, {good.seconds:.1f} s"))
    return good


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="3,5", help="these incidents only, and no good run unless --good says so")
    parser.add_argument("--good", metavar="N", type=int, help=f"so many good runs  [default: all {len(GOOD)}]")
    parser.add_argument("--workers", metavar="N", type=int, default=WORKERS, help="so many at a time  [default: 2]")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave everything that was made there")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--markdown", action="store_true", help=f"write the tables to {DOCUMENT.name}, too")
    given = parser.parse_args(argv)
    numbers = {incident.number for incident in INCIDENTS}
    try:
        given.numbers = {int(each) for each in given.only.split(",")} if given.only else numbers
    except ValueError:
        parser.error(f"--only {given.only}: expected numbers such as 3,5")
    if unknown := given.numbers - numbers:
        parser.error(f"--only: no incident {min(unknown)}; there are 1 to {len(INCIDENTS)}")
    given.count = given.good if given.good is not None else 0 if given.only else len(GOOD)
    return given


def main(argv: Sequence[str]) -> int:
    given = parse(argv)
    root = given.keep or Path(tempfile.mkdtemp(prefix="incidents-"))
    began = time.monotonic()
    with ThreadPoolExecutor(given.workers) as pool:
        chosen = [incident for incident in INCIDENTS if incident.number in given.numbers]
        shown = [pool.submit(show, incident, root / f"incident{incident.number:02}") for incident in chosen]
        well = [pool.submit(run_well, make, root / make.__name__) for make in GOOD[: given.count]]
        outcomes, good = [each.result() for each in shown], [each.result() for each in well]
    gallery = Gallery(outcomes, good, machine(), time.monotonic() - began)
    if given.markdown:
        put_between_marks(DOCUMENT, markdown(gallery))
    print(json.dumps(document(gallery), indent=2) if given.json else table(gallery))
    if given.keep is None and gallery.ok:
        shutil.rmtree(root)
    else:
        say(f"kept: {root}")
    return 0 if gallery.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
