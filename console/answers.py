"""What an evaluation on problems has told so far: its controls, and what became of each answer.

Columns that only grow, shared by all snapshots and cut by length: a thousand problems with a hundred answers each take
some megabytes. Of the texts one a problem is kept, that of its newest answer.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.measures import PASS_AT
from engine.pass_at_k import mean_pass_at_k
from engine.stream import Control, Measure, Problem
from engine.text import clean

TRUTH: Final[Mapping[str, float]] = {"empty": 0.0, "pass": 0.0, "constant": 0.0, "canonical": 1.0}
"""What each control scores on an evaluator that is to be believed. Not taken from the stream, which may be broken."""
OUTCOMES: Final = ("passed", "wrong", "error", "time", "memory", "gone", "unknown")
"""What becomes of an answer; `unknown` is what no writer of ours says."""
MAX_TASKS, MAX_SAMPLES, MAX_ANSWERS = 10_000, 10_000, 1 << 20
"""What a hostile stream may make us keep; anything beyond is counted and left out."""
_MOST_CONTROLS, _TEXT, _NAME = 64, 300, 200
_PASSED: Final = OUTCOMES.index("passed")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Newest:
    """The newest answer of a problem: which it is, its text, what it took."""

    sample: int
    outcome: str
    detail: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Task:
    """A problem and what became of its answers: how many of each outcome, in the order of `OUTCOMES`."""

    name: str
    counts: tuple[int, ...]
    newest: Newest | None = None

    @property
    def answers(self) -> int:
        """How many were judged."""
        return sum(self.counts)

    @property
    def passed(self) -> int:
        """How many of them solve it."""
        return self.counts[_PASSED]

    @property
    def solved(self) -> bool:
        """Whether any does."""
        return self.passed > 0

    @property
    def outcome(self) -> str:
        """The one outcome that tells most of it: passed where all did, else the most frequent of the others."""
        rest = [(count, -index) for index, count in enumerate(self.counts) if index != _PASSED and count]
        return OUTCOMES[-max(rest)[1]] if rest else "passed"


@dataclass(frozen=True)
class _Columns:
    """What all snapshots share; a snapshot reads no further than its own rows."""

    tasks: list[str] = field(default_factory=list)
    newest: list[Newest | None] = field(default_factory=list)
    task: array[int] = field(default_factory=lambda: array("i"))
    sample: array[int] = field(default_factory=lambda: array("i"))
    outcome: array[int] = field(default_factory=lambda: array("b"))
    t: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Answers:
    """A snapshot of an evaluation on problems; one without rows and controls is that of any other run.

    `told` are the controls of this attempt, as they came. `left_out` counts answers beyond what is kept.
    """

    told: tuple[Control, ...] = ()
    columns: _Columns = field(default_factory=_Columns, repr=False)
    rows: int = 0
    left_out: int = 0

    def __bool__(self) -> bool:
        return bool(self.told or self.rows)

    # Whether it can be believed

    @cached_property
    def controls(self) -> Mapping[str, Control]:
        """Each by its name, as it was told last; those of `TRUTH` first, in its order."""
        latest = {each.name: each for each in self.told}
        return {name: latest[name] for name in (*TRUTH, *latest) if name in latest}

    @cached_property
    def off(self) -> tuple[Control, ...]:
        """Controls that did not score what they must; also one that claims to have expected something else."""
        return tuple(each for each in self.controls.values() if is_off(each))

    @property
    def untold(self) -> tuple[str, ...]:
        """Controls that nothing was heard of."""
        return tuple(name for name in TRUTH if name not in self.controls)

    @property
    def believed(self) -> bool:
        """Whether the score may be shown as one: every control was told, and scored what it must."""
        return not self.off and not self.untold

    @property
    def asked(self) -> int | None:
        """How many problems are asked; None before a control told it."""
        return max((each.problems for each in self.controls.values()), default=None)

    # What came of the answers

    @cached_property
    def _latest(self) -> NDArray[np.bool_]:
        """Rows that stand: of an answer that was told twice the later one."""
        task, sample, _ = self._arrays()
        keys = task.astype(np.int64) * MAX_SAMPLES + sample
        stands = np.ones(self.rows, np.bool_)
        if self.rows > 1 and not bool((keys[1:] > keys[:-1]).all()):
            _, first = np.unique(keys[::-1], return_index=True)
            stands[:] = False
            stands[self.rows - 1 - first] = True
        return stands

    def _arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int8]]:
        # Copies: an array that somebody looks into cannot grow.
        kept, rows = self.columns, self.rows
        return (
            np.array(kept.task[:rows], np.int32),
            np.array(kept.sample[:rows], np.int32),
            np.array(kept.outcome[:rows], np.int8),
        )

    @cached_property
    def counts(self) -> Counts:
        """Answers by problem and outcome, shape [problems, outcomes], in the order in which problems were met."""
        task, _, outcome = self._arrays()
        known = int(task.max()) + 1 if self.rows else 0
        stands, width = self._latest, len(OUTCOMES)
        flat = np.bincount(task[stands] * width + outcome[stands], minlength=known * width)
        return flat.reshape(known, width)

    @property
    def judged(self) -> int:
        """Answers that were judged, each once."""
        return int(self.counts.sum())

    @property
    def passed(self) -> int:
        """Answers that solve their problem."""
        return int(self.counts[:, _PASSED].sum())

    @property
    def solved(self) -> int:
        """Problems of which any answer does."""
        return int((self.counts[:, _PASSED] > 0).sum())

    @property
    def by_outcome(self) -> dict[str, int]:
        """How many answers of each outcome that there is."""
        totals = self.counts.sum(axis=0)
        return {name: int(count) for name, count in zip(OUTCOMES, totals, strict=True) if count}

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Every problem that has an answer, numbers in names in the order of numbers."""
        rows = self.counts.tolist()
        whole = self.rows == len(self.columns.task)  # at an earlier moment the newest text is one that is yet to come
        newest = self.columns.newest if whole else [None] * len(rows)
        found = [Task(self.columns.tasks[at], tuple(row), newest[at]) for at, row in enumerate(rows) if any(row)]
        return tuple(sorted(found, key=lambda task: natural(task.name)))

    def pass_at(self, k: int) -> float | None:
        """The unbiased pass@k over the problems judged so far, whether or not it can be believed.

        None where one of them has fewer than `k` answers, or there is none.
        """
        pairs = self.counts[:, _PASSED].tolist(), self.counts.sum(axis=1).tolist()
        solved = [(n, c) for c, n in zip(*pairs, strict=True) if n]
        return mean_pass_at_k(solved, k) if solved and min(n for n, _ in solved) >= k else None

    def contradictions(self, measures: Mapping[str, Measure]) -> list[str]:
        """Where figures that were stated are not what controls and answers say, one sentence each.

        Args:
            measures: each by its name.
        """
        if self.left_out:
            return []
        held: list[tuple[str, float | None]] = [
            (f"control_{name}", each.observed) for name, each in self.controls.items() if name in TRUTH
        ]
        held += [(f"{part}pass_at_{k}", self.pass_at(k)) for k in PASS_AT for part in ("", "part_")]
        found = []
        for name, ours in held:
            stated = measures[name].value if name in measures else None
            if stated is not None and (ours is None or not math.isclose(stated, ours, rel_tol=1e-9, abs_tol=1e-12)):
                told = "nothing" if ours is None else f"{ours:g}"
                found.append(f"{name}: it says {stated:g}, its answers say {told}")
        return found

    def until(self, t: float) -> Answers:
        """What was told no later than `t`, in Unix seconds."""
        told = tuple(each for each in self.told if each.t <= t)
        times = self.columns.t
        rows = self.rows if not self.rows or times[self.rows - 1] <= t else bisect_right(times, t, 0, self.rows)
        return Answers(told, self.columns, rows, self.left_out)


class AnswersBuffer:
    """Gathers controls and answers; `answers` is what was gathered so far."""

    def __init__(self) -> None:
        self._columns = _Columns()
        self._index: dict[str, int] = {}
        self._told: list[Control] = []
        self._left_out = 0
        self.answers = Answers(columns=self._columns)

    def begin(self) -> None:
        """Another attempt: it tries its controls anew, and until then nothing is believed."""
        self._told = []

    def control(self, event: Control) -> None:
        """Takes the score of a control."""
        if len(self._told) < _MOST_CONTROLS:
            texts = {"name": clean(event.name, _NAME), "detail": clean(event.detail, 1_000)}
            self._told.append(msgspec.structs.replace(event, **texts))

    def answer(self, event: Problem) -> None:
        """Takes what became of an answer."""
        name, kept = clean(event.task, _NAME), self._columns
        known = name in self._index or len(self._index) < MAX_TASKS
        if not known or not 0 <= event.sample < MAX_SAMPLES or len(kept.task) >= MAX_ANSWERS:
            self._left_out += 1
            return
        outcome = outcome_of(event.passed, event.outcome)
        newest = Newest(event.sample, outcome, clean(event.detail, _TEXT), event.tokens, event.seconds)
        at = self._index.setdefault(name, len(kept.tasks))
        if at == len(kept.tasks):
            kept.tasks.append(name)
            kept.newest.append(newest)
        kept.newest[at] = newest
        kept.task.append(at)
        kept.sample.append(event.sample)
        kept.outcome.append(OUTCOMES.index(outcome))
        kept.t.append(event.t)

    def snapshot(self) -> Answers:
        """What was gathered so far; the same object while nothing came."""
        now = self.answers
        told = tuple(self._told)
        if (now.told, now.rows, now.left_out) != (told, len(self._columns.task), self._left_out):
            self.answers = Answers(told, self._columns, len(self._columns.task), self._left_out)
        return self.answers


def outcome_of(passed: bool, outcome: str) -> str:
    """The outcome as one of `OUTCOMES`; one that contradicts `passed` is unknown, and so no success."""
    sound = outcome in OUTCOMES and (outcome == "passed") == passed
    return outcome if sound else "unknown"


def is_off(control: Control) -> bool:
    """Whether a control did not score what it must, or was held against something else."""
    must = TRUTH.get(control.name)
    if must is None:
        return control.observed != control.expected
    return control.observed != must or control.expected != must or control.problems < 1


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key by which `HumanEval/9` comes before `HumanEval/10`."""
    parts: list[tuple[int, int, str]] = []
    digits, text = "", ""
    for letter in f"{name}\0":
        if letter.isascii() and letter.isdigit() and len(digits) < 18:
            parts += [(1, 0, text)] if text else []
            text, digits = "", digits + letter
        else:
            parts += [(0, int(digits), "")] if digits else []
            digits, text = "", text + letter
    return (*parts, (1, 0, text))


def scores(answers: Answers, ks: Sequence[int]) -> dict[int, float]:
    """pass@k of each `k` that there are answers for; nothing where it cannot be believed."""
    if not answers.believed:
        return {}
    found: Iterable[tuple[int, float | None]] = ((k, answers.pass_at(k)) for k in ks)
    return {k: value for k, value in found if value is not None}
