"""Answers whose score is known before: an evaluator that gives them another one is not to be believed. Needs no torch.

Three that solve nothing and one that solves everything go through the same sandbox as what a model says, each time and
on every problem that is asked.

- `empty`: nothing. A prompt that ends in a docstring is then a function that returns None.
- `pass`: a body that does nothing, which returns None whatever the prompt ends in.
- `constant`: a body that returns 7919. The other two return something false; this is something true, of a type that
  comparisons and arithmetic take, and a prime that no expected value is likely to be. A test that accepts whatever is
  true, or whatever is a number, shows here. Of HumanEval's problems no constant of a common kind (None, 0, 1, True,
  texts and containers, empty or not) solves one: it was tried.
- `canonical`: the answer that came with the problem, as it stands there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from engine.problems import Problem
from engine.sandbox import Program, Sandbox

CONSTANT: Final = 7919
"""The thousandth prime."""
EXPECTED: Final[Mapping[str, float]] = {"empty": 0.0, "pass": 0.0, "constant": 0.0, "canonical": 1.0}
"""Share of the problems that each control must solve, in the order in which they are told."""
_NAMED: Final = 3
"""Problems that a message names."""
_BEFORE_CODE: Final = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*")


@dataclass(frozen=True)
class Scored:
    """How a control did."""

    name: str
    passed: int
    """Problems that it solved."""
    problems: int
    off: tuple[str, ...]
    """The problems that it should not have solved, or should have, each with what came of it."""

    @property
    def observed(self) -> float:
        """Share of the problems that it solved, 0 to 1."""
        return self.passed / self.problems

    @property
    def expected(self) -> float:
        """Share of the problems that it has to solve."""
        return EXPECTED[self.name]

    @property
    def detail(self) -> str:
        """The first problems that make the difference; empty where there is none."""
        named = ", ".join(self.off[:_NAMED])
        rest = len(self.off) - _NAMED
        return f"{named} and {rest:,} more" if rest > 0 else named


def control_programs(problem: Problem) -> dict[str, Program]:
    """A problem's control programs, by name."""
    lead = _lead(problem)
    answers = {
        "empty": "",
        "pass": f"{lead}pass\n",
        "constant": f"{lead}return {CONSTANT}\n",
        "canonical": problem.canonical,
    }
    return {name: program(problem, answer) for name, answer in answers.items()}


def program(problem: Problem, answer: str) -> Program:
    """The program that an answer makes of a problem."""
    return Program(prompt=problem.prompt, completion=answer, test=problem.test, entry_point=problem.entry_point)


def run_controls(
    problems: Sequence[Problem],
    sandbox: Sandbox,
    poll: Callable[[], object],
    progress: Callable[[int, int], object],
) -> list[Scored]:
    """Runs every control of every problem.

    Args:
        problems: those that are asked.
        sandbox: the one that generated answers run in.
        poll: called often; may raise, which ends all of them.
        progress: told programs done and programs in all.

    Returns:
        A score a control, in the order of `EXPECTED`.
    """
    programs = [
        ((name, place), made)
        for place, problem in enumerate(problems)
        for name, made in control_programs(problem).items()
    ]
    passed: dict[str, int] = dict.fromkeys(EXPECTED, 0)
    off: dict[str, list[tuple[int, str]]] = {name: [] for name in EXPECTED}
    progress(0, len(programs))
    for done, ((name, place), outcome) in enumerate(sandbox.run_all(programs, poll), 1):
        passed[name] += outcome.passed
        if outcome.passed != (EXPECTED[name] == 1):
            what = outcome.outcome + (f": {outcome.detail}" if outcome.detail and not outcome.passed else "")
            off[name].append((place, f"{problems[place].task} ({what})"))
        progress(done, len(programs))
    return [
        Scored(
            name,
            passed[name],
            len(problems),
            tuple(text for _, text in sorted(off[name])),
        )
        for name in EXPECTED
    ]


def reason_of(scores: Sequence[Scored]) -> str | None:
    """Why nothing can be believed; None where every control did what it should."""
    wrong = [
        f"{score.name} scored {score.observed:.3g} and not {score.expected:.3g} on {score.problems:,} problems"
        for score in scores
        if score.off
    ]
    return f"controls: {'; '.join(wrong)}: the result is unknown" if wrong else None


def _lead(problem: Problem) -> str:
    """What stands before the first statement of a body: the right answer shows how the prompt wants it to go on."""
    found = _BEFORE_CODE.match(problem.canonical)
    return found[0] if found else ""
