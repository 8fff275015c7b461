"""Controls and judged answers of a stream, followed event by event as its writer went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from console.answers import OUTCOMES, TRUTH
from engine.measures import PASS_AT
from engine.pass_at_k import mean_pass_at_k
from engine.stream import Control, Inputs, Problem
from engine.text import clean

Key = tuple[str, int]
"""Task and number of an answer."""
MAX_ANSWERS: Final = 1 << 22
"""That are held against each other; a stream of more is told so."""


class Judged(NamedTuple):
    """What the stream says of an answer, and in which line."""

    passed: bool
    outcome: str
    detail: str
    tokens: int
    seconds: float
    line: int


class AnswerFold:
    """Follows what an evaluation on problems tells."""

    def __init__(self) -> None:
        self.controls: dict[str, tuple[Control, int]] = {}
        """Of the last attempt, each with its line."""
        self.answers: dict[Key, Judged] = {}
        self.measures: dict[str, float] = {}
        """Every figure as it was told last."""
        self.digests: dict[str, str] = {}
        self.over = False
        """There are more answers than are held against each other."""

    def begin(self) -> None:
        """Another attempt tries its controls anew."""
        self.controls = {}

    def see(self, event: Control | Problem | Inputs, line: int) -> Iterator[str]:
        """Takes an event; gives what cannot have been written so."""
        if isinstance(event, Inputs):
            self.digests = dict(event.digests)
        elif isinstance(event, Control):
            if event.name in self.controls:
                yield f"control {event.name} for the second time in its attempt"
            self.controls[event.name] = event, line
        else:
            yield from self._answer(event, line)

    def _answer(self, event: Problem, line: int) -> Iterator[str]:
        key = clean(event.task, 200), event.sample
        name = answer_name(key)
        if missing := [each for each in TRUTH if each not in self.controls]:
            yield f"{name} was judged before control {missing[0]}"
        if (event.outcome == "passed") != event.passed or event.outcome not in OUTCOMES[:-1]:
            yield f"{name}: passed is {str(event.passed).lower()} and its outcome is {event.outcome}"
        if key in self.answers:
            yield f"{name} for the second time, first in line {self.answers[key].line}"
        elif len(self.answers) >= MAX_ANSWERS:
            self.over = True
            return
        self.answers[key] = Judged(event.passed, event.outcome, event.detail, event.tokens, event.seconds, line)

    def pass_at(self) -> dict[int, float]:
        """pass@k of each k that there are answers for, from the answers of the stream."""
        return pass_at({key: each.passed for key, each in self.answers.items()})


def pass_at(passed: dict[Key, bool]) -> dict[int, float]:
    """pass@k of each k that every problem has answers for."""
    counts: dict[str, list[int]] = {}
    for (task, _), right in passed.items():
        count = counts.setdefault(task, [0, 0])
        count[0] += 1
        count[1] += right
    found = ((k, mean_pass_at_k([(n, c) for n, c in counts.values()], k)) for k in PASS_AT)
    return {k: value for k, value in found if value is not None}


def answer_name(key: Key) -> str:
    """`HumanEval/3 answer 0`."""
    return f"{key[0]} answer {key[1]}"
