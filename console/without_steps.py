"""What a run without steps came to: what was stored, how a model scored, what was published; the one way to tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from console import scored, stored
from console.run_state import RunState
from console.stored import measured
from engine.text import clean

Tone = Literal["", "good", "bad", "warn"]
_TITLE = "what was read back"
_READ_BACK = {"publish_files_differ": "files that differ", "publish_logit_error": "largest difference of logits"}


@dataclass(frozen=True)
class Came:
    """What a run that makes no steps came to.

    `name` is what `text` is of, in a word; `short` is what a list has room for. `figures` are names, values and details
    under `title`; of `tables` each has a head line. `of` says of what the run was, as its title has it.
    """

    name: str
    text: str
    short: str
    tone: Tone
    speed: str
    title: str
    figures: tuple[tuple[str, str, str], ...]
    tables: tuple[tuple[tuple[str, ...], ...], ...]
    of: str


def came(state: RunState) -> Came | None:
    """What it came to so far; None of a run that makes steps, or has not told what it is."""
    run = state.run
    if run is None or state.makes_steps:
        return None
    if stored.prepares(state):
        return _stored(state, f"{run.teacher} for {run.student}")
    if scored.evaluates(state):
        of = run.student if run.teacher is None else f"{run.student} against {run.teacher}"
        return _scored(state, of)
    return _published(state, run.student)


def _stored(state: RunState, of: str) -> Came:
    table = tuple(stored.fidelity_table(state))
    figures = tuple((each.name, measured(each), each.detail) for each in stored.fidelity(state))
    return Came(
        "stored",
        stored.stored_so_far(state),
        "",
        "",
        stored.storing_speed(state),
        "fidelity of what is stored",
        figures,
        (table,) if table else (),
        of,
    )


def _published(state: RunState, of: str) -> Came:
    told = [state.measures[name] for name in _READ_BACK if name in state.measures]
    figures = tuple((_READ_BACK[each.name], f"{each.value:g}", clean(each.detail, 300)) for each in told)
    if len(told) < len(_READ_BACK):
        text = "nothing was published that was read back" if state.end is not None else f"phase {state.phase}"
        return Came("published", text, "", "bad" if state.end is not None else "", "", _TITLE, figures, (), of)
    if all(each.value == 0 for each in told):
        return Came("published", "what came back is what was sent", "as sent", "good", "", _TITLE, figures, (), of)
    wrong = ", ".join(f"{name} {value}" for name, value, _ in figures)
    text = f"what came back is NOT what was sent: {wrong}"
    return Came("published", text, "NOT AS SENT", "bad", "", _TITLE, figures, (), of)


def _scored(state: RunState, of: str) -> Came:
    told, left = scored.score(state), tuple(scored.unsolved_table(state))
    tone: Tone = "bad" if told.believed is False else "good" if told.believed else ""
    figures = tuple((clean(name, 200), value, clean(detail, 300)) for name, value, detail in scored.figures(state))
    return Came(
        "score",
        told.text,
        told.short,
        tone,
        scored.speed(state),
        "controls and scores" if state.answers else "scores",
        figures,
        (left,) if left else (),
        of,
    )
