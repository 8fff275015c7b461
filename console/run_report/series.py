"""What a run measured as CSV: numbers whose bits come back when they are read, and nothing where nothing is known."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from console.answers import OUTCOMES
from console.run_reader import LoadedRun
from console.run_report.proof import JUDGED
from console.run_state import RunState
from console.series import STEP_COLUMNS
from engine.stream import Checkpoint

SERIES = ("steps", "evals", "checkpoints", "verdicts", "answers")
_CHUNK = 10_000
_UNITS = {"t": "t_unix_seconds", "seconds": "seconds"}
_WHOLE = ("step", "tokens")


def csv_of(loaded: LoadedRun, series: str) -> Iterator[str]:
    """The lines of one of `SERIES`, thousands at a time, a header first; NaN and infinity as the stream has them."""
    state = loaded.state
    if series == "steps":
        yield from _steps(state)
    elif series == "evals":
        yield _lines(("step", "t_unix_seconds", "loss", "ce", "kd", "agreement", "cosine", "tokens", "seconds"))
        yield _lines(*_evals(state))
    elif series == "checkpoints":
        yield _lines(("step", "t_unix_seconds", "kind", "path", "bytes", "tensors", "sha256", "seconds", "error"))
        yield _lines(*_checkpoints(state))
    elif series == "answers":
        yield _lines(("task", "answers", *OUTCOMES))
        yield _lines(*((task.name, task.answers, *task.counts) for task in state.answers.tasks))
    else:
        yield _lines(("id", "verdict", "severity", "expected", "observed", "step", "basis", "claim"))
        yield _lines(
            *(
                (v.id, v.verdict, v.severity, v.expected, v.observed, v.step, state.bases.get(v.id, JUDGED), v.claim)
                for v in state.judged
            )
        )


def _steps(state: RunState) -> Iterator[str]:
    yield _lines([state.source.unit if name == "step" else _UNITS.get(name, name) for name in STEP_COLUMNS])
    told = [name in state.source.columns for name in STEP_COLUMNS]
    columns = [state.steps.column(name) for name in STEP_COLUMNS]
    for begin in range(0, len(state.steps), _CHUNK):
        parts: list[Iterable[Any]] = []
        for name, column, shown in zip(STEP_COLUMNS, columns, told, strict=True):
            values = column[begin : begin + _CHUNK].tolist()
            form = _whole if name in _WHOLE else exact
            parts.append(map(form, values) if shown else [""] * len(values))
        yield _lines(*zip(*parts, strict=True))


def _evals(state: RunState) -> Iterator[Sequence[Any]]:
    timed = state.source.timed
    for e in state.evals:
        losses = [exact(e.loss), *("" if not timed and math.isnan(each) else exact(each) for each in (e.ce, e.kd))]
        agreed = ["" if each is None else exact(each) for each in (e.agreement, e.cosine)]
        cost = (e.tokens, exact(e.seconds)) if timed else ("", "")
        yield (e.step, exact(e.t) if timed else "", *losses, *agreed, *cost)


def _checkpoints(state: RunState) -> Iterator[Sequence[Any]]:
    timed = state.source.timed
    for c in state.checkpoints:
        t = exact(c.t) if timed else ""
        seconds = "" if not timed and math.isnan(c.seconds) else exact(c.seconds)
        if isinstance(c, Checkpoint):
            size = (c.bytes, c.tensors) if timed else ("", "")
            yield (c.step, t, c.kind, c.path, *size, c.sha256, seconds, "")
        else:
            yield (c.step, t, c.kind, "", "", "", "", seconds, c.error)


def _whole(value: float) -> str:
    return str(int(value)) if math.isfinite(value) else exact(value)


def exact(value: float) -> str:
    """A number in as many digits as tell it from all others; NaN, Infinity and -Infinity as in the stream."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _lines(*rows: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
