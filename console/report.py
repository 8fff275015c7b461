"""The end of a run as a table for people and as one JSON document for programs; both from the same state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from console import efficiency
from console.run_state import RunState
from console.scored import document as scored_document
from console.stored import prepares, store_of, stored_bytes, work_done
from console.without_steps import Came, came
from engine.errors import ExitCode
from engine.human import projected_line, smoke_line
from engine.stream import Eval, Step, Verdict
from engine.text import clean

SCHEMA = "kdconsole.run/1"
TABLE_WIDTH = 120
"""Columns from which on each verdict takes one line of a table."""

_GLYPHS = {"PASS": ("✔", "green"), "FAIL": ("✘", "bold red"), "PENDING": ("◌", "yellow"), "UNKNOWN": ("?", "yellow")}


@dataclass(frozen=True)
class Result:
    """A run that is over, as the front end concluded it."""

    id: str
    mode: str
    state: RunState
    exit_code: ExitCode
    status: str
    reason: str
    evidence: Path
    launch_seconds: float
    evidence_id: str | None = None
    """SHA-256 of SHA256SUMS; None where the evidence is not complete."""

    @property
    def decision(self) -> str:
        """`GO` or `NO-GO` for a smoke; else the status, or UNDECIDED where verdicts are missing."""
        if self.mode == "smoke":
            return "GO" if self.exit_code == ExitCode.OK else "NO-GO"
        undecided = self.status == "COMPLETED" and self.exit_code == ExitCode.UNDECIDED
        return "UNDECIDED" if undecided else self.status


def document(result: Result) -> dict[str, Any]:
    """Everything that the table has; non-finite numbers as the strings that the stream uses."""
    state, end = result.state, result.state.end
    summary = end.summary if end else {}
    projection = state.projection
    told: dict[str, Any] = _finite(
        {
            "schema": SCHEMA,
            "run": state.run.run if state.run else None,
            "id": result.id,
            "mode": result.mode,
            "decision": result.decision,
            "status": result.status,
            "reason": result.reason,
            "exit_code": int(result.exit_code),
            "steps": end.steps if end else (state.last_step.step if state.last_step else 0),
            "seconds": end.seconds if end else state.last_t - state.first_t,
            "launch_seconds": result.launch_seconds,
            "train_seconds": summary.get("train_seconds"),
            "initial_loss": state.first_step.loss if state.first_step else None,
            "final_loss": state.last_step.loss if state.last_step else None,
            "train_initial": _losses(state.first_step),
            "train_final": _losses(state.last_step),
            "heldout_initial": state.evals[0].loss if state.evals else None,
            "heldout_final": state.evals[-1].loss if len(state.evals) > 1 else None,
            "heldout_first": _losses(state.evals[0] if state.evals else None),
            "heldout_last": _losses(state.evals[-1] if len(state.evals) > 1 else None),
            "agreement_initial": state.evals[0].agreement if state.evals else None,
            "agreement_final": state.evals[-1].agreement if len(state.evals) > 1 else None,
            "throughput": summary.get("steps_per_second"),
            "tokens_per_second": summary.get("tokens_per_second"),
            "efficiency": efficiency.document(state.pace.mean),
            "peak_memory_bytes": summary.get("peak_device_bytes", summary.get("peak_rss_bytes")),
            "device": None if state.run is None else {"type": state.run.device, "name": state.run.device_name},
            "precision": state.run.precision if state.run else None,
            "config_fingerprint": state.run.config if state.run else None,
            "gate_fingerprint": state.run.gate if state.run else None,
            "phases": [{"name": p.name, "seconds": p.seconds} for p in state.phases],
            **_stored(state),
            **({} if (evaluation := scored_document(state)) is None else {"evaluation": evaluation}),
            "projection": None
            if projection is None
            else {
                "target_steps": projection.target_steps,
                "p10_seconds": projection.p10_seconds,
                "p50_seconds": projection.p50_seconds,
                "p90_seconds": projection.p90_seconds,
                "step_seconds": projection.step_seconds,
                "fixed_seconds": projection.fixed_seconds,
            },
            "verdicts": [
                {
                    "id": v.id,
                    "verdict": v.verdict,
                    "severity": v.severity,
                    "claim": v.claim,
                    "expected": v.expected,
                    "observed": v.observed,
                    "step": v.step,
                }
                for v in state.judged
            ],
            "disagreements": state.disagreements,
            "evidence": str(result.evidence),
            "evidence_id": result.evidence_id,
        }
    )
    return told


def _stored(state: RunState) -> dict[str, Any]:
    """What only a run that stores a teacher has."""
    if not prepares(state):
        return {}
    made, measures = work_done(state), state.measures.values()
    return {
        "stored": {
            "done": made.done if made else None,
            "total": made.total if made else None,
            "unit": made.unit if made else None,
            "bytes": stored_bytes(state),
            "store": store_of(state) or None,
        },
        "measures": [{"name": each.name, "value": each.value, "detail": each.detail} for each in measures],
    }


def show(result: Result, console: Console) -> None:
    """Prints the table; the lines that people grep for and paths that they copy keep their length."""
    for part in _parts(result):
        console.print(part, soft_wrap=isinstance(part, _Line))


def table(result: Result) -> RenderableType:
    """What an operator reads: why, and last, where the eye is when the command ends, the decision."""
    return Group(*_parts(result))


class _Line(Text):
    """A line that is not to be wrapped where that can be helped."""


def _parts(result: Result) -> list[RenderableType]:
    state, end = result.state, result.state.end
    parts: list[RenderableType] = []
    if result.exit_code == ExitCode.USAGE:
        # Nothing was trained: a table would only bury the one message.
        return [_evidence(result), _decision(result)]
    if result.mode == "smoke":
        if end is not None and "final_loss" in end.summary:
            parts.append(_Line(smoke_line(end)))
        if state.projection is not None:
            parts.append(_Line(projected_line(state.projection)))
    parts.append(_losses_table(state))
    parts.append(_facts(result))
    if (made := came(state)) is not None:
        parts.append(_figures(made))
    if state.judged:
        parts.append(_Verdicts(state.judged))
    parts += [Text(f"✘ verdicts disagree: {line}", style="bold red") for line in state.disagreements]
    parts.append(_evidence(result))
    parts.append(_decision(result))
    return parts


def _evidence(result: Result) -> _Line:
    known = f"\nevidence id  {result.evidence_id}" if result.evidence_id else ""
    return _Line(f"evidence  {clean(str(result.evidence))}{known}")


def _decision(result: Result) -> Text:
    """The decision, how many verdicts stand behind it, and each that stands against it."""
    good = result.exit_code == ExitCode.OK
    style = "bold green" if good else "bold red"
    binding = [v for v in result.state.judged if v.severity != "warn"]
    passed = sum(v.verdict == "PASS" for v in binding)
    text = Text("\n")
    text.append(f"{'✔' if good else '✘'} {result.decision}  ", style=style)
    text.append(clean(result.reason))
    if binding and result.exit_code != ExitCode.USAGE:
        text.append(f"; {passed} of {len(binding)} binding verdicts PASS")
    against = [v for v in binding if v.verdict == "FAIL" or (v.verdict != "PASS" and result.status == "COMPLETED")]
    for v in against:
        glyph, colour = _GLYPHS.get(v.verdict, ("?", "yellow"))
        text.append(f"\n  {glyph} {v.verdict} {v.id}", style=colour)
        text.append(f"  expected {v.expected}, observed {v.observed}")
    return text


def _losses_table(state: RunState) -> RenderableType:
    pairs: list[tuple[str, Step | Eval, Step | Eval]] = []
    if state.first_step and state.last_step:
        pairs.append(("train", state.first_step, state.last_step))
    if len(state.evals) > 1:
        pairs.append(("held-out", state.evals[0], state.evals[-1]))
    if not pairs:
        return Text("")
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("loss (nats a token)", "", "first", "last", "change", "top-1 agreement"):
        grid.add_column(name, justify="left" if name in ("", "loss (nats a token)") else "right", no_wrap=True)
    for label, first, last in pairs:
        agreement = ""
        if isinstance(first, Eval) and isinstance(last, Eval) and None not in (first.agreement, last.agreement):
            agreement = f"{first.agreement:.1%} to {last.agreement:.1%}"
        for part, name in (("total", "loss"), ("ce", "ce"), ("kd", "kd")):
            before, after = getattr(first, name), getattr(last, name)
            change = (after - before) / before if before else math.nan
            row = (part, f"{before:.4f}", f"{after:.4f}", f"{change:+.1%}" if math.isfinite(change) else "")
            grid.add_row(Text(label, style="bold") if name == "loss" else "", *row, agreement if name == "loss" else "")
    return Group(Text(""), grid)


def _facts(result: Result) -> RenderableType:
    state, end = result.state, result.state.end
    summary, made = end.summary if end else {}, came(state)
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()

    def fact(name: str, text: str) -> None:
        grid.add_row(name, Text(text))  # as text: a path or a device's name must not be read as markup

    phases = "  ".join(f"{p.name} {p.seconds:.1f}" for p in state.phases)
    fact("phases (s)", f"{phases}  (launch {result.launch_seconds:.1f})")
    if state.run is not None:
        run = state.run
        device = f"{run.device} {run.device_name}, {run.precision}"
        models = f"{run.student} on {run.teacher or 'no teacher'}"
        fact("run", f"{models if made is None else made.of}, {device}")
    if made is not None and made.text:
        fact(made.name, ", ".join(filter(None, (made.text, made.speed))))
    if place := store_of(state):
        fact("store", place)
    if "tokens_per_second" in summary:
        peak = summary.get("peak_device_bytes", summary.get("peak_rss_bytes", math.nan))
        steps = "" if made is not None else f"{summary.get('steps_per_second', math.nan):.2f} step/s, "
        speed = f"{summary['tokens_per_second']:,.0f} tokens/s, {steps}memory peak {peak / 2**30:.2f} GiB"
        fact("speed", speed)
    for name, text in efficiency.facts(state.pace.mean):
        fact(name, text)
    p = state.projection
    if p is not None:
        fact(
            "projection",
            f"{p.target_steps:,} steps in {duration(p.p50_seconds)} ({duration(p.p10_seconds)} to "
            f"{duration(p.p90_seconds)}), {p.step_seconds:.3f} s a step, {duration(p.fixed_seconds)} around them",
        )
    return Group(Text(""), grid)


def _figures(made: Came) -> RenderableType:
    """What a run without steps came to, figure by figure: how true a stored teacher is, controls and scores."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(made.title, no_wrap=True)
    grid.add_column("", justify="right", no_wrap=True)
    grid.add_column("", overflow="fold")
    for name, value, detail in made.figures:
        grid.add_row(Text(name), Text(value), Text(detail))
    parts: list[RenderableType] = [Text(""), grid] if grid.row_count else []
    for head, *rows in made.tables:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in head:
            table.add_column(name, justify="right" if made.name == "stored" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        parts += [Text(""), table]
    return Group(*parts)


class _Verdicts:
    """The verdicts, failures last, next to the decision: a table where there is room for one, else two lines each."""

    def __init__(self, verdicts: tuple[Verdict, ...]) -> None:
        order = {"PASS": 0, "PENDING": 1, "UNKNOWN": 2, "FAIL": 3}
        self._verdicts = sorted(verdicts, key=lambda v: order.get(v.verdict, 3))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < TABLE_WIDTH
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column("verdict", no_wrap=True)
        if narrow:
            grid.add_column("falsifier, expected, observed", overflow="fold")
        else:
            grid.add_column("falsifier", no_wrap=True)
            grid.add_column("expected", overflow="fold")
            grid.add_column("observed", overflow="fold")
        grid.add_column("step", justify="right")
        for v in self._verdicts:
            glyph, style = _GLYPHS.get(v.verdict, ("?", "yellow"))
            word = Text(f"{glyph} {v.verdict}" + (" (warn)" if v.severity == "warn" else ""), style=style)
            texts = [f"{v.id}\n{v.expected}: {v.observed}"] if narrow else [v.id, v.expected, v.observed]
            grid.add_row(word, *map(Text, texts), str(v.step))
        yield Text("")
        yield grid
        yield Text("")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: `25h 04m`, `3m 20s`, `12.3 s`."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600:,}h {whole % 3600 // 60:02d}m"


def _losses(event: Step | Eval | None) -> dict[str, float] | None:
    return None if event is None else {"total": event.loss, "ce": event.ce, "kd": event.kd}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
