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
            add(f"train{short}, {part}", (_train(state, name, part) for state in states))
    for name, parts in (("loss", "first last best"), ("ce", "last best"), ("kd", "last")):
        short = "" if name == "loss" else f" {name}"
        for part in parts.split():
            add(f"held-out{short}, {part}", (_held_out(state, name, part) for state in states))
    for part in ("first", "last", "best"):
        add(f"top-1 agreement, {part}", (_agreement(state, part) for state in states))
    lines += _at_equal_steps(states) + _at_equal_tokens(states)
    return Section("losses, nats per token", known(lines), _comparable(runs))


def _comparable(runs: Sequence[LoadedRun]) -> str:
    """What makes losses of these runs hard to compare."""
    notes = []
    weights = {(run.state.run.temperature, run.state.run.alpha) for run in runs if run.state.run}
    if len(weights) > 1:
        notes.append("temperature or alpha differ, so that totals and kd are of different losses: compare ce")
    heldout = ("data.path", "data.glob", "data.tokenizer", "data.heldout_fraction", "data.heldout_windows")
    data = {tuple(run.config.get(key) for key in (*heldout, "data.limit_bytes", "train.sequence")) for run in runs}
    if len(data) > 1:
        notes.append("the data differ, so that the losses are of different texts")
    return "; ".join(notes)


def _train(state: RunState, name: str, part: str) -> Cell:
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


def _held_out(state: RunState, name: str, part: str) -> Cell:
    evals = state.evals
    if not evals:
        return Cell()
    if part == "best":
        finite = [each for each in evals if math.isfinite(getattr(each, name))]
        best = min(finite, key=lambda each: float(getattr(each, name)), default=None)
        return Cell() if best is None else _loss(getattr(best, name), best.step)
    return _loss(getattr(evals[0 if part == "first" else -1], name))


def _agreement(state: RunState, part: str) -> Cell:
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
    """Losses at the largest step that all runs have made, and at the largest that all have evaluated."""
    lines = []
    common = _common([state.steps.column("step") for state in states])
    if common is not None:
        window = max(LEAST_STEPS, common // SHARE)
        cells = []
        for state in states:
            steps = state.steps.column("step")
            chosen = (steps > common - window) & (steps <= common)
            cells.append(_loss(float(state.steps.column("loss")[chosen].mean())))
        lines.append(Line(f"train at step {common:,}, mean of {min(window, common):,}", tuple(cells), measured=True))
    common = _common([np.array([each.step for each in state.evals], dtype=np.float64) for state in states])
    if common is not None:
        found = [[e for e in state.evals if e.step == common][-1] for state in states]
        for name in ("loss", "ce"):
            short = "" if name == "loss" else " ce"
            cells = [_loss(getattr(each, name)) for each in found]
            lines.append(Line(f"held-out{short} at step {common:,}", tuple(cells), measured=True))
        if all(each.agreement is not None for each in found):
            agreed = tuple(Cell(f"{each.agreement:.1%}", each.agreement) for each in found)
            lines.append(Line(f"top-1 agreement at step {common:,}", agreed, measured=True))
    return lines


def _common(steps: Sequence[Column]) -> int | None:
    shared = steps[0]
    for each in steps[1:]:
        shared = np.intersect1d(shared, each)
    return int(shared.max()) if len(shared) else None


def _at_equal_tokens(states: Sequence[RunState]) -> list[Line]:
    """Losses when each run had seen as many tokens as the one that has seen the fewest."""
    seen = [np.cumsum(state.steps.column("tokens")) for state in states]
    if not all(len(each) for each in seen):
        return []
    tokens = min(float(each[-1]) for each in seen)
    cells, held = [], []
    for state, total in zip(states, seen, strict=True):
        last = int(np.searchsorted(total, tokens, side="right"))  # steps that were made by then
        first = min(int(np.searchsorted(total, tokens * (1 - 1 / SHARE), side="right")), last - LEAST_STEPS)
        made = state.steps.column("loss")[max(0, first) : last]
        cells.append(_loss(float(made.mean())) if len(made) else Cell())
        step = state.steps.column("step")[last - 1] if last else 0
        before = [each for each in state.evals if each.step <= step]
        held.append(_loss(before[-1].loss, before[-1].step) if before else Cell())
    return [
        Line(f"train at {tokens:,.0f} tokens", tuple(cells), measured=True),
        Line(f"held-out by {tokens:,.0f} tokens", tuple(held), measured=True),
    ]
