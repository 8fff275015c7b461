"""In what several runs differ: what they are, how they were configured, what came of them, how fast they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from console.compared_answers import evaluations
from console.compared_losses import LEAST_STEPS, losses
from console.efficiency import basis, counted, utilisation
from console.efficiency import seconds as step_time
from console.outlook import outlook, verdict_counts
from console.palette import run_mark, verdict_mark
from console.report import duration
from console.run_index import view_of
from console.run_reader import LoadedRun
from console.run_state import DERIVED, RunState
from console.series import Column
from console.side_by_side import Cell, Line, Section, known, line_of, text_cell
from console.widgets.layout import number, size
from dispatch.evidence import Kind
from dispatch.manifest import SUMS, iso_utc
from dispatch.sums import read_sums
from engine.errors import RunError
from engine.projection import warm_up_steps
from engine.text import clean

VERDICTS, CONFIGURATION = "verdicts", "configuration, keys that differ"
"""Titles of two sections."""
INPUTS = ("teacher", "student", "tokenizer", "data")
SHORT_DIGEST = 12
"""Hexadecimal digits of a digest that are shown; programs get all of them."""
KINDS = {
    Kind.RUN: "a run of ours",
    Kind.OLD: "the predecessor's run",
    Kind.LOG: "a log alone",
    Kind.MANIFEST: "a manifest alone",
}


def differences(runs: Sequence[LoadedRun], now: float) -> tuple[Section, ...]:
    """Everything in which the runs can be compared; sections without lines are left out.

    Args:
        runs: at least one.
        now: Unix seconds, for the state of those that go on.
    """
    steps = any(run.state.makes_steps for run in runs)
    with np.errstate(all="ignore"):  # what a broken run gives is shown as it is, and not warned of on the screen
        trained = (losses(runs),) if steps else ()
        sections = (
            *(_about(runs, now), _configuration(runs), *evaluations(runs), *trained, _verdicts(runs)),
            _speed(runs),
            *(_inputs(runs), _evidence(runs)),
        )
    return tuple(section for section in sections if section.lines or section.note)


# What and where


def _about(runs: Sequence[LoadedRun], now: float) -> Section:
    def status(run: LoadedRun) -> Cell:
        if run.problem:
            return Cell("? UNREADABLE", "UNREADABLE", "$warning")
        mark = run_mark(outlook(view_of(run, now)).status)
        return Cell(f"{mark.glyph} {mark.word}", mark.word, mark.style)

    def steps(run: LoadedRun) -> Cell:
        state, asked = run.state, steps_wanted(run)
        last = steps_made(state)
        if last is None:
            return Cell()
        unit = "" if state.source.unit == "step" else f" {state.source.unit}s"
        return Cell(f"{last:,}" + (f" of {asked:,}" if asked else "") + unit, last)

    def created(run: LoadedRun) -> Cell:
        told = _moment(run.about.created)
        return Cell(told.replace("T", " ")[:16], told) if told else Cell()

    def seconds(value: float) -> Cell:
        return Cell(duration(value), value) if value > 0 else Cell()

    def of_run(name: str) -> Callable[[LoadedRun], Cell]:
        return lambda run: text_cell(getattr(run.state.run, name, None))

    def version(name: str) -> Callable[[LoadedRun], Cell]:
        return lambda run: text_cell(_versions(run).get(name))

    def took(run: LoadedRun) -> Cell:
        state = run.state
        if state.source.timed:
            return seconds(state.last_t - state.first_t)
        return seconds(state.end.seconds) if state.end else Cell()

    def teacher(run: LoadedRun) -> Cell:
        about = run.state.run
        if about is not None and about.teacher is None and run.state.source.timed:
            return Cell("none", "none")
        return text_cell(run.about.teacher)

    def in_steps(run: LoadedRun) -> Cell:
        known_seconds = "seconds" in run.state.source.columns and run.state.steps.thinned == 1
        return seconds(float(run.state.steps.column("seconds").sum())) if known_seconds else Cell()

    def attempts(run: LoadedRun) -> Cell:
        return _count(run.state.run.attempt if run.state.run and run.state.source.timed else None)

    def of_about(name: str) -> Callable[[LoadedRun], Cell]:
        return lambda run: text_cell(getattr(run.about, name))

    lines = [
        line_of("status", runs, status),
        line_of("problem", runs, lambda run: text_cell(run.problem)),
        line_of("directory", runs, lambda run: text_cell(clean(run.path.name, 200))),
        line_of("evidence of", runs, lambda run: text_cell(KINDS[run.kind])),
        line_of("mode", runs, of_about("mode")),
        line_of("campaign phase", runs, of_about("phase")),
        line_of("created, UTC", runs, created),
        line_of("steps", runs, steps),
        line_of("took", runs, took, measured=True),
        line_of("in steps", runs, in_steps, measured=True),
        line_of("attempts", runs, attempts),
        line_of("teacher", runs, teacher),
        *(line_of(name, runs, of_about(name)) for name in ("student", "host")),
        line_of("device", runs, of_run("device_name")),
        line_of("precision", runs, of_run("precision")),
        line_of("contract", runs, lambda run: text_cell(run.manifest.contract_sha256[:12] if run.manifest else None)),
        *(
            line_of(name, runs, version(name))
            for name in dict.fromkeys(name for run in runs for name in _versions(run))
        ),
    ]
    return Section("run", known(lines))


def steps_wanted(run: LoadedRun) -> int | None:
    """How many steps it was to make; None where nobody said, and of a smoke that goes on for as long as it may."""
    about = run.state.run
    if about is not None and about.mode == "smoke" and run.state.source.timed:
        return about.max_steps
    return run.about.steps_asked


def steps_made(state: RunState) -> int | None:
    """How many steps it made, as its last step and its end tell it; None where nothing says so."""
    told = [state.last_step.step] if state.last_step else []
    told += [state.end.steps] if state.end and state.source.verbatim and state.end.steps else []
    return max(told, default=None)


def _moment(t: float | None) -> str:
    """Unix seconds as ISO 8601 in UTC; empty where nobody knows, or it is no time."""
    try:
        return "" if t is None else iso_utc(t)
    except (OverflowError, ValueError, OSError):
        return ""


def _versions(run: LoadedRun) -> dict[str, str | None]:
    told = run.state.run.versions if run.state.run else {}
    return {**(run.manifest.versions if run.manifest else {}), **told}


def _count(value: int | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:,}", value)


# Speed


def _speed(runs: Sequence[LoadedRun]) -> Section:
    def rate(run: LoadedRun, column: str) -> Cell:
        if not {"seconds", column} <= run.state.source.columns:
            return Cell()
        seconds, amount = _steady(run.state, "seconds"), _steady(run.state, column)
        if not len(seconds) or seconds.sum() <= 0:
            return Cell()
        value = float((amount.sum() if column == "tokens" else len(seconds)) / seconds.sum())
        return Cell(f"{value:,.0f}" if value >= 1_000 else number(value), value)

    def per_second(run: LoadedRun) -> Cell:
        told = run.state.end.summary.get("steps_per_second") if run.state.end else None
        if told is None or run.state.source.timed:  # our own is measured step by step
            return rate(run, "seconds")
        return Cell(number(told), told)

    def used(run: LoadedRun) -> Cell:
        mean = run.state.pace.mean
        value = None if mean is None else utilisation(mean)
        return Cell() if value is None else Cell(f"{value:.1%}", value)

    def part(name: str) -> Callable[[LoadedRun], Cell]:
        def cell(run: LoadedRun) -> Cell:
            value = run.state.pace.mean.split.get(name) if run.state.pace.mean else None
            return Cell() if value is None else Cell(step_time(value), value)

        return cell

    def peak(run: LoadedRun) -> Cell:
        summary = run.state.end.summary if run.state.end else {}
        value = summary.get("peak_device_bytes", summary.get("peak_rss_bytes"))
        return Cell() if value is None else Cell(size(value), value)

    def projected(run: LoadedRun) -> Cell:
        p = run.state.projection
        if p is None:
            return Cell()
        if not math.isfinite(p.p10_seconds) or not math.isfinite(p.p90_seconds):  # a log tells one number only
            return Cell(duration(p.p50_seconds), p.p50_seconds)
        around = f"{duration(p.p10_seconds)} to {duration(p.p90_seconds)}"
        return Cell(f"{duration(p.p50_seconds)} ({around})", p.p50_seconds)

    def target(run: LoadedRun) -> Cell:
        return _count(run.state.projection.target_steps if run.state.projection else None)

    means = [run.state.pace.mean for run in runs]
    parts = dict.fromkeys(name for mean in means if mean is not None for name in mean.split)
    lines = [
        line_of("tokens/s", runs, lambda run: rate(run, "tokens"), measured=True),
        line_of("steps/s", runs, per_second, measured=True),
        line_of("MFU", runs, used, measured=True),
        line_of("MFU is of", runs, lambda run: text_cell(run.state.pace.mean and basis(run.state.pace.mean))),
        line_of("counted", runs, lambda run: text_cell(run.state.pace.mean and counted(run.state.pace.mean))),
        *(line_of(f"a step: {name}", runs, part(name), measured=True) for name in parts),
        line_of("memory peak", runs, peak, measured=True),
        line_of("projection", runs, projected, measured=True),
        line_of("projected steps", runs, target),
    ]
    return Section("speed, without the first steps", known(lines))


def _steady(state: RunState, column: str) -> Column:
    """Of the steps that are neither warm-up nor without a time."""
    seconds = state.steps.column("seconds")
    timed = np.isfinite(seconds) & (seconds > 0)
    seconds, values = seconds[timed], state.steps.column(column)[timed]
    return values[warm_up_steps(seconds.tolist()) :] if len(seconds) >= LEAST_STEPS else values


# Verdicts and configuration


def _verdicts(runs: Sequence[LoadedRun]) -> Section:
    judged = [{v.id: v for v in run.state.judged} for run in runs]

    def cell(identifier: str, index: int) -> Cell:
        verdict = judged[index].get(identifier)
        if verdict is None:
            return Cell()
        mark, basis = verdict_mark(verdict.verdict), runs[index].state.bases.get(identifier, "")
        return Cell(f"{mark.glyph} {mark.word}" + (f" ({basis})" if basis else ""), mark.word, mark.style)

    def counts(run: LoadedRun) -> Cell:
        told = ", ".join(f"{count} {word}" for word, count in reversed(verdict_counts(run.state)))
        return text_cell(told)

    identifiers = dict.fromkeys(identifier for each in judged for identifier in each)
    lines = tuple(Line(name, tuple(cell(name, index) for index in range(len(runs)))) for name in identifiers)
    contracts = {run.manifest.contract_sha256 if run.manifest else run.kind for run in runs if run.state.judged}
    notes = ["the contracts differ: the same name may stand for another check"] if len(contracts) > 1 else []
    if any(DERIVED in basis for run in runs for basis in run.state.bases.values()):
        notes.append("derived: judged anew from its numbers, no contract of its own being there")
    return Section(VERDICTS, (*known([line_of("all of them", runs, counts)]), *lines), "; ".join(notes))


def _configuration(runs: Sequence[LoadedRun]) -> Section:
    """Keys that differ. Of a predecessor's run only what its manifest says is known, and silence is no difference."""
    told = [asked(run) for run in runs]
    whole = [bool(run.config) for run in runs]
    lines = []
    for key in dict.fromkeys(key for each in told for key in each):
        cells = tuple(_setting(each, key) for each in told)
        told_of = zip(cells, whole, strict=True)
        known_to = [cell.value for cell, all_keys in told_of if all_keys or cell.value is not None]
        if any(value != known_to[0] for value in known_to):
            lines.append(Line(key, cells))
    unread = "; ".join(f"{run.label}: {run.config_problem}" for run in runs if run.config_problem)
    same = "" if lines or unread or len(runs) < 2 else "no key differs"
    return Section(CONFIGURATION, tuple(lines), unread or same)


def _setting(settings: Mapping[str, object], key: str) -> Cell:
    if key not in settings:
        return Cell()
    value = settings[key]
    plain = value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return Cell("none" if value is None else str(value), "none" if value is None else plain)


def asked(run: LoadedRun) -> Mapping[str, object]:
    """What a run was asked to do, by full key path: its configuration, or what the predecessor's manifest says of it.

    What has no key of ours there stands below `predecessor.`.
    """
    old = run.evidence.old if run.evidence else None
    if run.config or old is None:
        return run.config
    told: dict[str, object] = {
        "teacher.path": old.teacher,
        "student.path": old.student,
        "train.steps": old.steps,
        "train.batch": old.batch_size,
        "train.learning_rate": old.learning_rate,
        "distill.temperature": old.temperature,
        "distill.alpha": old.alpha,
        "checkpoint.every_steps": old.checkpoint_every,
        "smoke.max_steps": old.max_steps,
        "data.path": old.dataset_dir,
        "predecessor.epochs": old.epochs,
        "predecessor.log_every": old.log_every,
        "predecessor.backend": old.backend,
        **{f"predecessor.{key}": value for key, value in old.extra.items()},
    }
    return {key: value for key, value in told.items() if value is not None and value != ""}


# What went in, and what proves it


def _inputs(runs: Sequence[LoadedRun]) -> Section:
    """Digests of what was loaded, and which of them are the same; known of runs of ours that were sealed."""

    def digest(run: LoadedRun, name: str) -> Cell:
        told = run.manifest.inputs.get(name, "") if run.manifest else ""
        return Cell(told[:SHORT_DIGEST], told) if told else Cell()

    names = dict.fromkeys((*INPUTS, *(name for run in runs if run.manifest for name in run.manifest.inputs)))
    lines = [line_of(name, runs, lambda run, name=name: digest(run, name)) for name in names]  # type: ignore[misc]
    if len(runs) < 2:
        return Section("inputs, SHA-256", known(lines))
    found: dict[str, list[str]] = {"the same": [], "different": [], "not known of all": []}
    for line in lines:
        values = {cell.value for cell in line.cells}
        kind = "different" if len(values - {None}) > 1 else "not known of all" if None in values else "the same"
        found[kind].append(line.label)
    note = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items() if names)
    return Section("inputs, SHA-256", known(lines), note)


def _evidence(runs: Sequence[LoadedRun]) -> Section:
    """By what each directory can be known again."""

    def identifier(run: LoadedRun) -> Cell:
        try:
            told = read_sums(run.path).evidence_id
        except RunError:
            return Cell()
        return Cell(told[:SHORT_DIGEST], told)

    lines = known([line_of("evidence id", runs, identifier)])
    return Section("evidence", lines, "" if lines else f"none has a {SUMS}, and so no evidence id")
