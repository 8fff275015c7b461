"""What is said of an evaluation: its score, and first of all whether that can be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from console.answers import OUTCOMES, TRUTH, is_off, scores
from console.run_state import RunState
from engine.measures import OF_HELDOUT, OF_HELDOUT_WITH_TEACHER, PASS_AT
from engine.stream import Control

MODE: Final = "evaluate"
_HELDOUT: Final = (*OF_HELDOUT, *OF_HELDOUT_WITH_TEACHER)
_NAMES: Final = {
    "heldout_loss": "held-out loss",
    "heldout_perplexity": "perplexity",
    "teacher_agreement": "top-1 agreement with the teacher",
    "teacher_kl": "KL to the teacher",
}
UNKNOWN: Final = "UNKNOWN"


@dataclass(frozen=True)
class Score:
    """What to say of a score in one sentence, and in few characters.

    `believed` is False where something speaks against it, and None where it is not known yet. `short` is what a list
    shows; empty where there is nothing to show.
    """

    text: str
    short: str
    believed: bool | None


def evaluates(state: RunState) -> bool:
    """Whether a run evaluates a model."""
    return state.run is not None and state.run.mode == MODE


def score(state: RunState) -> Score:
    """The score of an evaluation as far as it came; never a figure whose controls are off or not told."""
    if state.answers:
        return _of_problems(state)
    told = [(name, state.measures[name].value) for name in _HELDOUT if name in state.measures]
    if not told:
        over = state.end is not None
        return Score("nothing was scored" if over else "nothing is scored yet", "", None)
    text = ", ".join(f"{_NAMES[name]} {_figure(name, value)}" for name, value in told)
    name, value = told[0]
    short = f"loss {_figure(name, value)}" if name == "heldout_loss" else f"{_NAMES[name]} {_figure(name, value)}"
    return Score(text, short, all(math.isfinite(value) for _, value in told))


def _of_problems(state: RunState) -> Score:
    answers, over = state.answers, state.end is not None
    if answers.off:
        return Score(f"{UNKNOWN}: controls off: {'; '.join(map(off_text, answers.off))}", UNKNOWN, False)
    if differing := answers.contradictions(state.measures) if over else []:
        return Score(f"{UNKNOWN}: {differing[0]}", UNKNOWN, False)
    if answers.untold:
        missing = f"{_listed(answers.untold)} not told"
        if answers.rows or over:
            return Score(f"{UNKNOWN}: controls {missing}", UNKNOWN, False)
        return Score(f"the controls are being tried: {missing} yet", "", None)
    if not answers.judged:
        return Score("the controls hold; no answer is judged" + ("" if over else " yet"), "", None)
    found = scores(answers, PASS_AT)
    named = ", ".join(f"pass@{k} {percent(value)}" for k, value in found.items())
    whole = whole_suite(state)
    so_far = "" if whole else " so far" if not over else " as far as it came"
    part = " of a part of the suite" if is_part(state) else ""
    text = f"{named}{part}{so_far}: {counted(state)}"
    # A part's score must not pass for that of the suite where there is room for a number alone.
    short = f"pass@1 {percent(found[1])}" + (f" of {len(answers.tasks):,}" if part else "" if whole else " …")
    return Score(text, short, True)


def counted(state: RunState) -> str:
    """`52 of 164 problems solved`; with several answers a problem how many of these are right, too."""
    answers = state.answers
    tasks = answers.tasks
    of = f"{len(tasks):,}" if answers.asked in (None, len(tasks)) else f"{len(tasks):,} judged"
    text = f"{answers.solved:,} of {of} problems solved"
    if answers.judged > len(tasks):
        text += f", {answers.passed:,} of {answers.judged:,} answers right"
    if answers.left_out:
        text += f"; {answers.left_out:,} answers are not counted here"
    return text


def whole_suite(state: RunState) -> bool:
    """Whether every answer was judged: the run says so by a figure of all of them."""
    return any(f"{part}pass_at_1" in state.measures for part in ("", "part_"))


def is_part(state: RunState) -> bool:
    """Whether the score is of some problems of the suite alone: no more were asked, or are kept here."""
    return "part_pass_at_1" in state.measures or state.answers.left_out > 0


def percent(share: float) -> str:
    """`31.7 %`; exact where it is all or nothing."""
    return "100 %" if share == 1 else "0 %" if share == 0 else f"{100 * share:.1f} %"


def figure(value: float) -> str:
    """A control's score: `0`, `1.0`, `0.1524`."""
    return {0.0: "0", 1.0: "1.0"}.get(value, f"{value:.4g}")


def off_text(control: Control) -> str:
    """`empty scored 0.15, must be 0 (HumanEval/3, …)`."""
    must = TRUTH.get(control.name, control.expected)
    why = f" ({control.detail})" if control.detail else ""
    if control.expected != must:
        why = f", and it was held against {figure(control.expected)}{why}"
    return f"{control.name} scored {figure(control.observed)}, must be {figure(must)}{why}"


def control_word(state: RunState, name: str) -> tuple[str, bool | None]:
    """A control in few characters, and whether it holds: `empty 0`; None where it was not told."""
    told = state.answers.controls.get(name)
    if told is None:
        return f"{name} ?", None
    must = TRUTH.get(name, told.expected)
    return (
        (f"{name} {figure(told.observed)}", True)
        if not is_off(told)
        else (
            f"{name} {figure(told.observed)}, must be {figure(must)}",
            False,
        )
    )


def controls_text(state: RunState) -> str:
    """`✔ empty 0, ✔ pass 0, ✔ constant 0, ✔ canonical 1.0, on 164 problems`; empty of any other run."""
    if not state.answers:
        return ""
    glyphs = {True: "✔", False: "✘", None: "◌"}
    told = (control_word(state, name) for name in (*TRUTH, *(n for n in state.answers.controls if n not in TRUTH)))
    asked = state.answers.asked
    return ", ".join(f"{glyphs[holds]} {text}" for text, holds in told) + (f", on {asked:,} problems" if asked else "")


def outcomes_text(state: RunState) -> str:
    """`52 passed, 80 wrong, 20 error`; empty before the first answer."""
    return ", ".join(f"{count:,} {name}" for name, count in state.answers.by_outcome.items())


def figures(state: RunState) -> list[tuple[str, str, str]]:
    """Every figure of an evaluation with its detail; of one whose controls are off none that would be a score."""
    if not evaluates(state):
        return []
    if not state.answers:
        told = [state.measures[name] for name in _HELDOUT if name in state.measures]
        return [(_NAMES[each.name], _figure(each.name, each.value), each.detail) for each in told]
    rows = []
    for name, told_of in state.answers.controls.items():
        word = "✘ OFF" if is_off(told_of) else "✔"
        must = figure(TRUTH.get(name, told_of.expected))
        rows.append(
            (f"control {name}", f"{word} {figure(told_of.observed)}", f"must be {must}; {told_of.detail}".rstrip("; "))
        )
    if told_of_answers := outcomes_text(state):
        rows.append(("answers", f"{state.answers.judged:,}", told_of_answers))
    if score(state).believed:
        part = "of a part, " if is_part(state) else ""
        found = scores(state.answers, PASS_AT)
        rows += [(f"pass@{k}", percent(value), f"{part}{value:.6f}") for k, value in found.items()]
    return rows


def speed(state: RunState) -> str:
    """`2.31 completions/s`, over the answers of the last attempt; empty where nothing tells it."""
    for unit in ("completions", "windows"):
        told = [each for each in state.pace.reports if each.unit == unit]
        if len(told) > 1 and told[-1].done > told[0].done and told[-1].seconds > told[0].seconds:
            rate = (told[-1].done - told[0].done) / (told[-1].seconds - told[0].seconds)
            return f"{rate:,.0f} {unit}/s" if rate >= 99.95 else f"{rate:.3g} {unit}/s"
    return ""


def unsolved_table(state: RunState, most: int = 20) -> list[tuple[str, ...]]:
    """Problems that no answer solves, with how their answers ended, a head line first; empty where there is none."""
    if not score(state).believed:
        return []
    left = [task for task in state.answers.tasks if not task.solved]
    rows = [
        (
            task.name,
            ", ".join(f"{count:,} {name}" for name, count in zip(OUTCOMES, task.counts, strict=True) if count),
            task.newest.detail if task.newest else "",
        )
        for task in left[:most]
    ]
    if len(left) > most:
        rows.append((f"and {len(left) - most:,} more", "", ""))
    return [("not solved", "answers", "the last one's end"), *rows] if rows else []


def document(state: RunState) -> dict[str, Any] | None:
    """What a program is told of an evaluation; null of any other run, and no score where it cannot be believed."""
    if not evaluates(state):
        return None
    answers, told = state.answers, score(state)
    heldout = {name: state.measures[name].value for name in _HELDOUT if name in state.measures}
    return {
        "score": told.text,
        "believed": told.believed,
        "heldout": heldout or None,
        "controls": [
            {
                "name": name,
                "observed": each.observed,
                "must_be": TRUTH.get(name, each.expected),
                "holds": not is_off(each),
                "problems": each.problems,
                "detail": each.detail or None,
            }
            for name, each in answers.controls.items()
        ],
        "whole": whole_suite(state),
        "part": is_part(state),
        "pass_at": {str(k): value for k, value in scores(answers, PASS_AT).items()} if told.believed else {},
        "problems": [
            {"task": task.name, "answers": task.answers, "passed": task.passed, "outcome": task.outcome}
            for task in answers.tasks
        ],
        "outcomes": answers.by_outcome,
    }


def _figure(name: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return percent(value) if name == "teacher_agreement" else f"{value:.4f}" if value < 1e4 else f"{value:.4g}"


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
