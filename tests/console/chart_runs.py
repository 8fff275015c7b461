"""Runs that never were, as the chart gets them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from console.chart.frame import Frame
from console.chart.model import Page, Plot, RunLanes, one_run
from console.run_state import RunState
from console.series import STEP_COLUMNS, StepSeries
from console.view import Link, View
from engine.stream import Eval
from tests.streams import EPOCH, eval_event, run_event

Floats = NDArray[np.float64]


def series(loss: Sequence[float] | Floats, *, seconds: float = 1.0, **columns: Sequence[float] | Floats) -> StepSeries:
    """Steps 1, 2, 3, … with these losses; ce is 1 below and kd 1 above unless given."""
    total = np.asarray(loss, np.float64)
    steps = np.arange(1.0, len(total) + 1.0)
    with np.errstate(all="ignore"):
        given = {
            "step": steps,
            "t": EPOCH + seconds * steps,
            "loss": total,
            "ce": total - 1,
            "kd": total + 1,
            **columns,
        }
    rest = {"lr": np.full(len(total), 1e-4), "grad_norm": np.ones(len(total)), "seconds": np.full(len(total), seconds)}
    rows = [np.asarray(given.get(name, rest.get(name, np.zeros(len(total))))) for name in STEP_COLUMNS]
    return StepSeries(np.array(rows, np.float64))


def evaluation(step: int, loss: float, *, agreement: float | None = 0.5, seconds: float = 1.0) -> Eval:
    event = eval_event(step, loss, None if agreement is None else agreement * 2)
    return msgspec.structs.replace(event, t=EPOCH + seconds * step)


def state(
    loss: Sequence[float] | Floats = (), *, evals: Sequence[Eval] = (), teacher: str | None = "builtin:teacher",
    target: int = 50_000, **columns: Sequence[float] | Floats,
) -> RunState:  # fmt: skip
    run = run_event(teacher=teacher, target_steps=target)
    steps = series(loss, **columns)
    last = float(steps.column("t")[-1]) if len(steps) else 0.0
    return RunState(run=run, steps=steps, evals=tuple(evals), events=1, last_t=last)


def view(shown: RunState, *, live: bool = False, now: float = 0.0) -> View:
    return View(state=shown, link=Link(live=live), now=now)


def plot(shown: RunState, page: Page = "loss", *, live: bool = False, now: float = 0.0) -> Plot:
    lanes = RunLanes()
    lanes.update(shown)
    return one_run(lanes, page, live=live, now=now)


def rows(frame: Frame) -> list[str]:
    """The picture's rows, all of its width."""
    return ["".join(text for text, _ in frame.canvas.line(row)) for row in range(frame.canvas.height)]


def cell(frame: Frame, row: int, column: int) -> str:
    """The character in a cell of the box."""
    return chr(frame.canvas.codes[frame.box.top + row, frame.box.left + column])


def lit(frame: Frame, dot_row: int, dot_column: int) -> bool:
    """Whether a dot of the box is drawn."""
    code = ord(cell(frame, dot_row // 4, dot_column // 2))
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    return 0x2800 <= code < 0x2900 and bool(code & bits[dot_row % 4][dot_column % 2])
