"""The losses of several runs: first, last and best, and where they can be compared step by step or token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from console.run_reader import LoadedRun
from console.run_state import RunState
from console.series import Column
from console.side_by_side import Cell, Line, Section, known
from console.widgets.layout import number
from engine.stream import Eval

LEAST_STEPS = 10
SHARE = 50
"""A training loss at some moment is the mean of the last one in so many steps (or tokens) before it, of 10 at least."""

_NONE: Column = np.empty(0)


def _loss(value: float | None, at: int | None = None) -> Cell:
    if value is None:
        return Cell()
    return Cell(
        number(value) + ("" if at is None else f" at {at:,}"), value, "" if math.isfinite(value) else "bold $error"
    )


def losses(runs: Sequence[LoadedRun]) -> Section:
    """What training and held-out losses were, in nats per token, and where they may not be compared."""
    states = [run.state for run in runs]
    lines: list[Line] = []

    def add(label: str, cells: Iterable[Cell]) -> None:
        lines.append(Line(label, tuple(cells), measured=True))

    for name, parts in (("loss", "first last best"), ("ce", "last best"), ("kd", "last")):
        short = "" if name == "loss" else f" {name}"
        for part in parts.split():
            add(f"train{short}, {part}", (train_loss(state, name, part) for state in states))
    for name, parts in (("loss", "first last best"), ("ce", "last best"), ("kd", "last")):
        short = "" if name == "loss" else f" {name}"
        for part in parts.split():
            add(f"held-out{short}, {part}", (held_out_loss(state, name, part) for state in states))
    for part in ("first", "last", "best"):
        add(f"top-1 agreement, {part}", (agreement(state, part) for state in states))
    with np.errstate(all="ignore"):
        lines += _at_equal_steps(states) + _at_equal_tokens(states)
    return Section("losses, nats per token", known(lines), _comparable(runs))


def _comparable(runs: Sequence[LoadedRun]) -> str:
    """What makes losses of these runs hard to compare."""
    notes = []
    told = [(run.state.run.temperature, run.state.run.alpha) for run in runs if run.state.run]
    weights = {pair for pair in told if not any(map(math.isnan, pair))}  # NaN: nobody said
    if len(weights) > 1:
        notes.append("temperature or alpha differ, so that totals and kd are of different losses: compare ce")
    heldout = ("data.path", "data.glob", "data.tokenizer", "data.heldout_fraction", "data.heldout_windows")
    keys = (*heldout, "data.limit_bytes", "train.sequence")
    data = {tuple(run.config.get(key) for key in keys) for run in runs if run.config}
    if len(data) > 1:
        notes.append("the data differ, so that the losses are of different texts")
    if silent := [run.label for run in runs if not run.config and run.state.events]:
        notes.append(f"nothing says which texts the losses of {', '.join(silent)} are of")
    if len({run.state.source.unit for run in runs if len(run.state.steps)}) > 1:
        notes.append("one counts steps and another epochs, so that nothing is at equal steps")
    return "; ".join(notes)


def stated(state: RunState, part: str) -> float | None:
    """The first or last loss as the end of a log tells it; None where it does not, or where every step tells its own.

    The steps that a log of other programs shows may be few, and need be neither the first nor the last one.
    """
    if not state.source.verbatim or state.end is None:
        return None
    return state.end.summary.get({"first": "initial_loss", "last": "final_loss"}.get(part, ""))


def train_loss(state: RunState, name: str, part: str) -> Cell:
    """A training loss (`loss`, `ce` or `kd`), `first`, `last` or `best`; the best one with its step."""
    if name not in state.source.columns:
        return Cell()
    if name == "loss" and (told := stated(state, part)) is not None:
        return _loss(told)
    values, steps = state.steps.column(name), state.steps.column("step")
    if not len(values):
        return Cell()
    if part == "best":
        finite = np.isfinite(values)
        if not finite.any():
            return Cell()
        best = int(np.argmin(np.where(finite, values, np.inf)))
        return _loss(float(values[best]), int(steps[best]))
    return _loss(float(values[0 if part == "first" else -1]))


def held_out_loss(state: RunState, name: str, part: str) -> Cell:
    """The same of the held-out part."""
    evals = _evals(state, name)
    if not evals:
        return Cell()
    if part == "best":
        finite = [each for each in evals if math.isfinite(getattr(each, name))]
        best = min(finite, key=lambda each: float(getattr(each, name)), default=None)
        return Cell() if best is None else _loss(getattr(best, name), best.step)
    return _loss(getattr(evals[0 if part == "first" else -1], name))


def _evals(state: RunState, name: str) -> Sequence[Eval]:
    """Those that tell a loss: a log of other programs tells no parts of it, and they stand as NaN."""
    if state.source.timed:
        return state.evals
    return [each for each in state.evals if math.isfinite(getattr(each, name))]


def agreement(state: RunState, part: str) -> Cell:
    """How often the student's first choice is the teacher's, `first`, `last` or `best`."""
    evals = [each for each in state.evals if each.agreement is not None]
    if not evals:
        return Cell()
    if part == "best":
        best = max(evals, key=_agreed)
        return Cell(f"{_agreed(best):.1%} at {best.step:,}", _agreed(best))
    value = _agreed(evals[0 if part == "first" else -1])
    return Cell(f"{value:.1%}", value)


def _agreed(event: Eval) -> float:
    return -math.inf if event.agreement is None or math.isnan(event.agreement) else event.agreement


def _at_equal_steps(states: Sequence[RunState]) -> list[Line]:
    """Losses at the largest step that all runs have made, and at the largest that all have evaluated.

    A run without any is left out of it; two at least have to have some.
    """
    lines = []
    made = [state.steps.column("step") if state.source.unit == "step" else _NONE for state in states]
    common = _common(made)
    if common is not None:
        window = max(LEAST_STEPS, common // SHARE)
        cells = []
        for state, steps in zip(states, made, strict=True):
            if not len(steps):
                cells.append(Cell())
                continue
            chosen = (steps > common - window) & (steps <= common)
            cells.append(_loss(float(state.steps.column("loss")[chosen].mean())))
        label = f"train at step {common:,}, mean of {min(window, common):,}"
        lines.append(Line(label, tuple(cells), measured=True, always=True))
    evals = [_evals(state, "loss") if state.source.unit == "step" else () for state in states]
    common = _common([np.array([each.step for each in some], dtype=np.float64) for some in evals])
    if common is not None:
        found = [[e for e in some if e.step == common][-1] if some else None for some in evals]
        for name in ("loss", "ce"):
            short = "" if name == "loss" else " ce"
            told = [each if each in _evals(state, name) else None for state, each in zip(states, found, strict=True)]
            cells = [_loss(None if each is None else getattr(each, name)) for each in told]
            lines.append(Line(f"held-out{short} at step {common:,}", tuple(cells), measured=True, always=True))
        if all(each is None or each.agreement is not None for each in found):
            agreed = tuple(Cell() if each is None else Cell(f"{each.agreement:.1%}", each.agreement) for each in found)
            lines.append(Line(f"top-1 agreement at step {common:,}", agreed, measured=True, always=True))
    return lines


def _common(steps: Sequence[Column]) -> int | None:
    """The largest number that stands in all of these, those that are empty left out."""
    there = [each for each in steps if len(each)]
    if len(there) < min(2, len(steps)):
        return None
    shared = there[0]
    for each in there[1:]:
        shared = np.intersect1d(shared, each)
    return int(shared.max()) if len(shared) else None


def _tells_tokens(state: RunState) -> bool:
    return "tokens" in state.source.columns and state.steps.thinned == 1  # else those of some steps are not kept


def _at_equal_tokens(states: Sequence[RunState]) -> list[Line]:
    """Losses when each run had seen as many tokens as the one that has seen the fewest.

    Runs that do not tell their tokens, or have made no step, are left out; two at least have to tell them.
    """
    seen = [np.cumsum(state.steps.column("tokens")) if _tells_tokens(state) else _NONE for state in states]
    totals = [float(each[-1]) for each in seen if len(each)]
    if len(totals) < min(2, len(states)) or not min(totals) > 0:
        return []
    tokens = min(totals)
    cells, held = [], []
    for state, total in zip(states, seen, strict=True):
        if not len(total):
            cells.append(Cell())
            held.append(Cell())
            continue
        last = int(np.searchsorted(total, tokens, side="right"))  # steps that were made by then
        first = min(int(np.searchsorted(total, tokens * (1 - 1 / SHARE), side="right")), last - LEAST_STEPS)
        made = state.steps.column("loss")[max(0, first) : last]
        cells.append(_loss(float(made.mean())) if len(made) else Cell())
        step = state.steps.column("step")[last - 1] if last else 0
        before = [each for each in state.evals if each.step <= step]
        held.append(_loss(before[-1].loss, before[-1].step) if before else Cell())
    return [
        Line(f"train at {tokens:,.0f} tokens", tuple(cells), measured=True, always=True),
        Line(f"held-out by {tokens:,.0f} tokens", tuple(held), measured=True, always=True),
    ]
