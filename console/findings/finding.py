"""What is found to have gone wrong in a past run: its form, and the case that every rule looks at."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from console.journal import Journal, read_journal
from console.run_reader import LoadedRun
from console.run_state import STATED, RunState
from console.series import Column
from dispatch.evidence import Kind
from dispatch.manifest import EVENTS, SUMS
from dispatch.old_manifest import OldManifest
from dispatch.sums import Checked
from dispatch.supervisor import open_regular
from engine.falsifiers import FAIL, FIRST_PHASE
from engine.stream import MAX_LINE_BYTES, Verdict
from engine.text import clean

SEVERE, WARNING, NOTE = "severe", "warning", "note"
SEVERITIES = (SEVERE, WARNING, NOTE)
"""What cost the run or its proof, what somebody should look at, and what is good to know; the worst first."""
MOST = 5
"""Of one kind so many are told one by one; the last of them says how many more there are."""

_AGAIN: Final = re.compile(rb'^\{"event": ?"step".*"again": ?true')


@dataclass(frozen=True)
class Finding:
    """Something that happened in a run and that should not have, or must be known.

    `kind` is a stable word for programs and `text` a sentence. `at` is in seconds from the run's first event, None
    where nobody can tell. `source` names the file that says so. `count` is how many of the kind this one stands for;
    `step` and `at` are those of the worst. `verdict` is the id of the falsifier that FAILs for the same reason.
    """

    kind: str
    severity: str
    text: str
    step: int | None = None
    at: float | None = None
    source: str = EVENTS
    count: int = 1
    verdict: str = ""


@dataclass(frozen=True)
class Case:
    """A run and what stands beside it; `checked` is None where there are no checksums to hold it against."""

    loaded: LoadedRun
    checked: Checked | None = None
    told: set[str] = field(default_factory=set)
    """Falsifiers whose FAIL a finding already tells."""

    @property
    def state(self) -> RunState:
        """What was folded."""
        return self.loaded.state

    @property
    def ours(self) -> bool:
        """Its stream is ours, with times and everything; else a log of text lines, or nothing at all."""
        return self.loaded.kind is Kind.RUN

    @property
    def old(self) -> OldManifest | None:
        """The predecessor's manifest."""
        return self.loaded.evidence.old if self.loaded.evidence else None

    @cached_property
    def source(self) -> str:
        """The file that the steps are from."""
        logs = self.loaded.evidence.logs if self.loaded.evidence else ()
        return clean(logs[0].name, 100) if logs and not self.ours else EVENTS

    @cached_property
    def journal(self) -> Journal:
        """What the supervisor wrote down."""
        return read_journal(self.loaded.path) if self.ours else Journal()

    @cached_property
    def made_again(self) -> int:
        """Steps that a later attempt made again, since the one before could not keep them."""
        if not self.ours or self.state.run is None or self.state.run.attempt < 2:
            return 0
        return _count_again(self.loaded.path)

    @property
    def over(self) -> bool:
        """Nothing more comes of it, and what is here is all that there was."""
        return not (self.loaded.going_on or self.loaded.problem or unasked(self.loaded))

    def column(self, name: str) -> Column:
        """A column of the steps; empty where the source cannot tell it."""
        column = self.state.steps.column(name)
        return column if name in self.state.source.columns else column[:0]

    def at(self, t: float | None) -> float | None:
        """Unix seconds as seconds from the run's first event; None where that is no such time."""
        if t is None or not self.state.source.timed or not self.state.first_t:
            return None
        passed = t - self.state.first_t
        return passed if 0 <= passed < math.inf else None

    def moment(self, row: int) -> float | None:
        """When a row of the steps was made, as `at`."""
        return self.at(float(self.state.steps.column("t")[row]))

    @property
    def until(self) -> float:
        """Unix seconds of the last that is known of it: its last event, or the end of its process."""
        record = self.loaded.exit
        ended = record.ended if record is not None and self.state.end is None else 0.0
        return max(self.state.last_t, ended if math.isfinite(ended) else 0.0)

    def attempt_starts(self) -> list[float]:
        """When each attempt began, in Unix seconds."""
        return [phase.started for phase in self.state.phases if phase.name == FIRST_PHASE]

    def failing(self, *beginnings: str) -> Iterator[Verdict]:
        """FAILs of these falsifiers that numbers stand behind, all of any without an argument; they count as told."""
        for verdict in self.state.judged:
            meant = not beginnings or verdict.id.startswith(beginnings)
            if beginnings and self.state.bases.get(verdict.id) == STATED:
                continue
            if meant and verdict.verdict == FAIL and verdict.id not in self.told:
                self.told.add(verdict.id)
                yield verdict

    def when(self, verdict: Verdict) -> float | None:
        """When a verdict came to be what it is, as `at`."""
        return self.at(next((v.t for v in reversed(self.state.history) if v.id == verdict.id), None))


def unasked(loaded: LoadedRun) -> bool:
    """Whether a run of another host may have gone on there: its end is not here, and it was never sealed."""
    manifest = loaded.manifest
    if manifest is None or manifest.remote is None or manifest.outcome is not None:
        return False
    return loaded.state.end is None and loaded.exit is None and not (loaded.path / SUMS).exists()


def _count_again(path: Path) -> int:
    """Steps of a stream that say they are made again; the fold keeps none of those that they stand for."""
    count = 0
    with contextlib.suppress(OSError):
        descriptor = open_regular(path / EVENTS, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                count += b'"again"' in line and _AGAIN.search(line) is not None
    return count


Rule = Callable[[Case], Iterable[Finding]]


def steps_word(count: int, unit: str = "step") -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"
