"""Sections of a report that tell the run: what ran, how its losses went, what it saved, how long everything took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from console.chart.frame import Look
from console.chart.model import RunLanes, one_run
from console.chart.scale import number
from console.compared_losses import agreement, held_out_loss, train_loss
from console.differences import asked, steps_made, steps_wanted
from console.palette import CHECKPOINTS
from console.report import duration
from console.run_reader import LoadedRun
from console.run_report.model import (
    NOT_SAID,
    Block,
    Curve,
    Facts,
    Moment,
    Paragraph,
    Said,
    Section,
    Table,
    Timeline,
    Tone,
    known,
    marked,
    said,
)
from console.run_state import RunState
from console.side_by_side import Cell
from console.stored import store_of
from console.widgets.layout import size
from console.without_steps import came
from dispatch.manifest import iso_utc
from engine.stream import Checkpoint, CheckpointFailed

MOST_CHECKPOINTS = 40
"""Rows of the table of checkpoints; of more, those in the middle are counted."""
SMOOTHING = 0.9
FEW_STEPS = 100
"""Of fewer the losses are drawn as they are: a moving average would lag behind all of them."""


def moment(t: float | None) -> str:
    """Unix seconds as `2026-11-21 09:36:44 UTC`; empty where that is no time."""
    try:
        return "" if t is None else iso_utc(t).replace("T", " ").replace("Z", " UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def of_cell(cell: Cell) -> Said:
    """What the table of a comparison has, as a report says it."""
    if cell.value is None:
        return said(None)
    bad = isinstance(cell.value, float) and not math.isfinite(cell.value)
    return said(cell.text, "bad" if bad else "")


def units(state: RunState, count: int | None) -> str:
    """A number of steps, or of epochs where the log counts these."""
    return "" if count is None else f"{count:,}" + ("" if state.source.unit == "step" else f" {state.source.unit}s")


_OF_STEPS = ("loss", "learning rate", "steps asked", "steps made", "steps/s")
"""Facts of a run that makes steps."""


def what_ran(loaded: LoadedRun, told: Mapping[str, Cell]) -> Section:
    """What was trained, on what, from whom, and where."""
    state, about, run = loaded.state, loaded.about, loaded.state.run
    ours = run if run is not None and state.source.timed else None
    settings = asked(loaded)
    old = loaded.evidence.old if loaded.evidence else None
    weights = [f"{name} {value}" for name, value in _weights(loaded).items()]
    device = f"{ours.device} {ours.device_name}, {ours.precision}" if ours else old.backend if old else ""
    tokens = f"{ours.tokens_per_step:,}" if ours and state.makes_steps else ""
    batch = " × ".join(str(settings[key]) for key in ("train.batch", "train.sequence") if key in settings)
    rows: tuple[tuple[str, Said], ...] = (
        ("student", said(about.student, code=True)),
        ("teacher", said("none") if ours and ours.teacher is None else said(about.teacher, code=True)),
        ("data", said(settings.get("data.path"), code=True)),
        ("loss", said(", ".join(weights))),
        ("learning rate", said(settings.get("train.learning_rate"))),
        ("batch", said(batch)),
        ("tokens a step", said(tokens)),
        ("steps asked", said(_asked_steps(loaded))),
        ("steps made", said(units(state, steps_made(state)))),
        ("mode", said(about.mode)),
        ("campaign phase", said(about.phase)),
        ("host", said(about.host)),
        ("device", said(device)),
        ("created", said(moment(about.created))),
        ("ended", said(moment(_ended(loaded)))),
        ("took", of_cell(told["took"]) if "took" in told else said(None)),
        ("tokens/s", of_cell(told.get("tokens/s", Cell()))),
        ("steps/s", of_cell(told.get("steps/s", Cell()))),
        ("memory peak", of_cell(told.get("memory peak", Cell()))),
        ("ticket", said(about.ticket)),
        ("falsifier", said(about.falsifier)),
    )
    if not state.makes_steps:
        without = (*_OF_STEPS, *(("data", "batch") if state.answers else ()))
        rows = tuple(row for row in rows if row[0] not in without)
    optional = {"ticket", "falsifier", "campaign phase", "memory peak", "tokens a step", "tokens/s"}
    return Section("ran", "What ran", (Facts(tuple(r for r in rows if r[0] not in optional or r in known([r]))),))


def _asked_steps(loaded: LoadedRun) -> str:
    run, wanted = loaded.state.run, steps_wanted(loaded)
    if wanted is None and run is not None and run.mode == "smoke" and run.budget_seconds:
        return f"as many as {run.budget_seconds:g} s allow"
    return units(loaded.state, wanted)


def _weights(loaded: LoadedRun) -> dict[str, str]:
    run = loaded.state.run
    values = {"temperature": run.temperature, "alpha": run.alpha} if run else {}
    settings = asked(loaded)
    told = {}
    for name in ("temperature", "alpha"):
        value = values.get(name, math.nan)
        if not math.isfinite(value):
            value = settings.get(f"distill.{name}", math.nan)  # type: ignore[assignment]
        if isinstance(value, int | float) and math.isfinite(value):
            told[name] = f"{value:g}"
    return told


def _ended(loaded: LoadedRun) -> float | None:
    if loaded.manifest is not None and loaded.manifest.ended is not None:
        return loaded.manifest.ended
    if loaded.exit is not None:
        return loaded.exit.ended
    return loaded.state.last_t if loaded.state.source.timed and loaded.state.end is not None else None


# Losses


def stored_section(loaded: LoadedRun) -> Section | None:
    """How much of a teacher was stored and how true it is, or how a model scored; of a run that makes no steps."""
    made = came(loaded.state)
    if made is None:
        return None
    stores = made.name == "stored"
    tone: Tone = "" if made.tone == "good" else made.tone
    facts = [(made.name, said(made.text, tone)), ("speed", said(made.speed))]
    facts += [("store", said(store_of(loaded.state), code=True))] if stores else []
    blocks: list[Block] = [Facts(tuple(facts))]
    if made.figures:
        rows = tuple(tuple(map(said, each)) for each in made.figures)
        blocks.append(Table(("fidelity" if stores else made.title, "", ""), rows, frozenset((1,))))
    for head, *figures in made.tables:
        cells = tuple(tuple(said(cell) if stores else Said(cell) for cell in row) for row in figures)
        blocks.append(Table(head, cells, frozenset(range(len(head))) if stores else frozenset()))
    title = {"stored": "The stored teacher", "score": "Score and controls"}.get(made.name, "What was published")
    return Section(made.name, title, tuple(blocks))


def loss_section(loaded: LoadedRun, name: str) -> Section | None:
    """The curve, and the first, last and best of every loss; of a run that makes steps."""
    state = loaded.state
    if not state.makes_steps:
        return None
    rows = []
    with_teacher = state.run is None or state.run.teacher is not None
    for label, column in (("total", "loss"), ("ce", "ce"), ("kd", "kd")):
        if column == "kd" and not with_teacher:
            continue
        rows += [_row("train", label, [train_loss(state, column, part) for part in ("first", "last", "best")])]
    for label, column in (("total", "loss"), ("ce", "ce"), ("kd", "kd")):
        if column == "kd" and not with_teacher:
            continue
        rows += [_row("held-out", label, [held_out_loss(state, column, part) for part in ("first", "last", "best")])]
    rows += [_row("top-1 agreement", "", [agreement(state, part) for part in ("first", "last", "best")])]
    there: list[tuple[Said, ...]] = []
    for row in rows:
        repeated = any(row[1:4] == other[1:4] for other in there)  # ce is the total where there is no teacher
        if not repeated and any(cell.text != NOT_SAID for cell in row[1:4]):
            there.append(row)
    blocks: list[Block] = []
    if len(state.steps):
        blocks.append(curve_of(state, name))
    if there:
        header = ("nats per token", "first", "last", "best", "change")
        blocks.append(Table(header, tuple(there), frozenset((1, 2, 3, 4))))
    else:
        blocks.append(Paragraph(said("No step was made, or none was told.", "muted")))
    return Section("losses", "Losses", tuple(blocks))


def _row(where: str, name: str, cells: Sequence[Cell]) -> tuple[Said, ...]:
    first, last = cells[0].value, cells[1].value
    change = ""
    if isinstance(first, float) and isinstance(last, float) and first and math.isfinite(last - first):
        change = f"{last - first:+.1%}" if where == "top-1 agreement" else f"{(last - first) / abs(first):+.1%}"
    if where == "top-1 agreement" and change:
        change = change.replace("%", " points")
    return (said(f"{where} {name}".strip()), *map(of_cell, cells), Said(change))


def curve_of(state: RunState, name: str) -> Curve:
    """The losses over all steps; the envelope behind the smoothed line shows every single step's."""
    lanes = RunLanes()
    lanes.update(state)
    few = len(state.steps) < FEW_STEPS
    return Curve(one_run(lanes, "loss", live=False, now=state.last_t), Look(smoothing=0.0 if few else SMOOTHING), name)


# Checkpoints


def checkpoint_section(loaded: LoadedRun) -> Section | None:
    """What was saved when, on the axis of the steps and as a table."""
    state = loaded.state
    if not state.checkpoints and not state.evals:
        return None
    moments = [_moment(each) for each in state.checkpoints]
    moments += [Moment(e.step, "evaluation", f"held-out {number(e.loss)} at {e.step:,}") for e in state.evals]
    made = steps_made(state) or 0
    blocks: list[Block] = [Timeline(made, steps_wanted(loaded) or None, tuple(moments), state.source.unit)]
    if state.checkpoints:
        blocks.append(_checkpoint_table(state.checkpoints, state.source.timed))
    else:
        blocks.append(Paragraph(said("No checkpoint was made, or none was told.", "muted")))
    return Section("checkpoints", "Checkpoints and evaluations", tuple(blocks))


def _moment(event: Checkpoint | CheckpointFailed) -> Moment:
    if isinstance(event, CheckpointFailed):
        return Moment(event.step, "failed", f"FAILED at {event.step:,}: {event.error}")
    kinds = event.kind.split("+")
    kind = next((kind for kind in ("final", "best", "interrupt") if kind in kinds), "periodic")
    return Moment(event.step, kind, f"{event.kind} at {event.step:,}")


def _checkpoint_table(events: Sequence[Checkpoint | CheckpointFailed], timed: bool) -> Table:
    header = ("step", "kind", "size", "took", "SHA-256 of its weights" if timed else "path")
    shown = list(events)
    half = MOST_CHECKPOINTS // 2
    left_out = max(0, len(shown) - MOST_CHECKPOINTS)
    rows = []
    for index, event in enumerate(shown):
        if left_out and half <= index < len(shown) - half:
            if index == half:
                rows.append((said("…"), said(f"{left_out:,} more"), said("…"), said("…"), said("…")))
            continue
        if isinstance(event, CheckpointFailed):
            what = marked(CHECKPOINTS["failed"], f": {event.error}")
            rows.append((said(f"{event.step:,}"), what, said(None), said(_seconds(event.seconds)), said(None)))
            continue
        proof = said(event.sha256 if timed else event.path, code=True)
        took = said(_seconds(event.seconds))
        rows.append((said(f"{event.step:,}"), said(event.kind), said(_bytes(event.bytes)), took, proof))
    return Table(header, tuple(rows), frozenset((0, 2, 3)))


def _seconds(value: float) -> str:
    return duration(value) if math.isfinite(value) else ""


def _bytes(value: int) -> str:
    return size(value) if value else ""


# Time


def projection_section(loaded: LoadedRun, told: Mapping[str, Cell]) -> Section | None:
    """What was projected, and what it really took."""
    state, p = loaded.state, loaded.state.projection
    if p is None:
        return None
    projected = duration(p.p50_seconds)
    if math.isfinite(p.p10_seconds) and math.isfinite(p.p90_seconds):
        projected += f" ({duration(p.p10_seconds)} to {duration(p.p90_seconds)})"
    made, took = steps_made(state), told.get("took", Cell()).value
    basis = f"{p.samples:,} steps, {p.step_seconds:.3f} s each, {duration(p.fixed_seconds)} around them"
    rows = [
        ("projected", said(f"{p.target_steps:,} steps in {projected}")),
        ("it stands on", said(basis if p.samples and math.isfinite(p.step_seconds) else None)),
    ]
    rate = told.get("steps/s", Cell()).value
    if made and isinstance(took, float):
        rows.append(("this run took", said(f"{duration(took)} for {units(state, made)} steps")))
        if made == p.target_steps and p.p50_seconds > 0:
            rows.append(("real to projected", said(f"{took / p.p50_seconds:.2f}")))
    if made != p.target_steps:
        scaled = ""
        if isinstance(rate, float) and rate > 0:
            scaled = (
                f"; at this run's mean of {rate:,.3g} steps/s they alone would take {duration(p.target_steps / rate)}"
            )
        rows.append(("real", said(f"not known: {p.target_steps:,} steps were not run here{scaled}")))
    return Section("projection", "Projection and what it really took", (Facts(tuple(rows)),))


def phase_section(loaded: LoadedRun) -> Section | None:
    """How long each phase took, those of the same name together; of logs without times there is nothing to tell."""
    state = loaded.state
    if not state.phases or not state.source.timed:
        return None
    whole = sum(phase.seconds for phase in state.phases) or math.nan
    rows = []
    for name, same in groupby(state.phases, lambda phase: phase.name):
        seconds = sum(phase.seconds for phase in same)
        share = f"{seconds / whole:.1%}" if math.isfinite(seconds / whole) else ""
        rows.append((said(name), said(_seconds(seconds)), said(share)))
    return Section("phases", "Phases", (Table(("phase", "took", "share"), tuple(rows), frozenset((1, 2))),))


def attempt_section(loaded: LoadedRun) -> Section | None:
    """Every start of the trainer, where there was more than one or its end was recorded."""
    attempts = loaded.manifest.attempts if loaded.manifest else ()
    if not attempts:
        count = loaded.state.run.attempt if loaded.state.run and loaded.state.source.timed else 1
        if count < 2 and loaded.exit is None:
            return None
        how = loaded.exit.describe() if loaded.exit else None
        facts = (("attempts", said(count)), ("the last one ended with", said(how)))
        return Section("attempts", "Attempts", (Facts(facts),))
    rows = []
    for each in attempts:
        times = each.started is not None and each.ended is not None
        took = _seconds(each.ended - each.started) if times and each.ended and each.started else ""
        started = said(moment(each.started))
        rows.append((said(each.number), started, said(moment(each.ended)), said(took), said(each.end)))
    header = ("attempt", "started", "ended", "took", "end")
    return Section("attempts", "Attempts", (Table(header, tuple(rows), frozenset((0, 3))),))


def asked_section(loaded: LoadedRun) -> Section | None:
    """In what the run was not what had been asked for; left out where nothing differs."""
    state, run, settings = loaded.state, loaded.state.run, asked(loaded)
    pairs: list[tuple[str, object, object]] = [("steps", steps_wanted(loaded), steps_made(state))]
    if run is not None and state.source.timed:
        pairs += [
            ("device", settings.get("train.device"), run.device),
            ("precision", settings.get("train.precision"), run.precision),
            ("temperature", settings.get("distill.temperature"), run.temperature),
            ("alpha", settings.get("distill.alpha"), run.alpha),
        ]
    elif run is not None:
        pairs += [
            ("teacher", settings.get("teacher.path"), run.teacher),
            ("student", settings.get("student.path"), run.student),
            ("temperature", settings.get("distill.temperature"), _finite(run.temperature)),
            ("alpha", settings.get("distill.alpha"), _finite(run.alpha)),
        ]
    rows = [
        (said(name), said(_plain(wanted)), said(_plain(ran)))
        for name, wanted, ran in pairs
        if wanted not in (None, "") and ran not in (None, "") and wanted != ran
    ]
    if not rows:
        return None
    return Section("asked", "Asked for and run", (Table(("what", "asked", "run"), tuple(rows)),))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
