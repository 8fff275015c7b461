"""In what several runs differ: what they are, how they were configured, what came of them, how fast they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from console.compared_losses import LEAST_STEPS, losses
from console.outlook import outlook
from console.palette import run_mark, verdict_mark
from console.report import duration
from console.run_index import view_of
from console.run_reader import LoadedRun
from console.run_state import RunState
from console.series import Column
from console.side_by_side import Cell, Line, Section, known, line_of, text_cell
from console.widgets.layout import number, size
from engine.projection import warm_up_steps
from engine.text import clean


def differences(runs: Sequence[LoadedRun], now: float) -> tuple[Section, ...]:
    """Everything in which the runs can be compared; sections without lines are left out.

    Args:
        runs: at least one.
        now: Unix seconds, for the state of those that go on.
    """
    with np.errstate(all="ignore"):  # what a broken run gives is shown as it is, and not warned of on the screen
        sections = (_about(runs, now), _configuration(runs), losses(runs), _verdicts(runs), _speed(runs))
    return tuple(section for section in sections if section.lines or section.note)


# What and where


def _about(runs: Sequence[LoadedRun], now: float) -> Section:
    def status(run: LoadedRun) -> Cell:
        if run.problem:
            return Cell("? UNREADABLE", "UNREADABLE", "$warning")
        mark = run_mark(outlook(view_of(run, now)).status)
        return Cell(f"{mark.glyph} {mark.word}", mark.word, mark.style)

    def steps(run: LoadedRun) -> Cell:
        last, asked, about = run.state.last_step, run.state.target_steps, run.state.run
        if about is not None and about.mode == "smoke":
            asked = about.max_steps  # else it goes on for as long as it may
        if last is None:
            return Cell()
        return Cell(f"{last.step:,}" + (f" of {asked:,}" if asked else ""), last.step)

    def created(run: LoadedRun) -> Cell:
        told = run.manifest.created if run.manifest else ""
        return Cell(told.replace("T", " ")[:16], told) if told else Cell()

    def seconds(value: float) -> Cell:
        return Cell(duration(value), value) if value > 0 else Cell()

    def of_run(name: str) -> Callable[[LoadedRun], Cell]:
        return lambda run: text_cell(getattr(run.state.run, name, None))

    def version(name: str) -> Callable[[LoadedRun], Cell]:
        return lambda run: text_cell(_versions(run).get(name))

    lines = [
        line_of("status", runs, status),
        line_of("problem", runs, lambda run: text_cell(run.problem)),
        line_of("directory", runs, lambda run: text_cell(clean(run.path.name, 200))),
        line_of("mode", runs, lambda run: text_cell(run.manifest.mode if run.manifest else None)),
        line_of("created, UTC", runs, created),
        line_of("steps", runs, steps),
        line_of("first to last event", runs, lambda run: seconds(run.state.last_t - run.state.first_t), measured=True),
        line_of("in steps", runs, lambda run: seconds(float(run.state.steps.column("seconds").sum())), measured=True),
        line_of("attempts", runs, lambda run: _count(run.state.run.attempt if run.state.run else None)),
        *(line_of(name, runs, of_run(name)) for name in ("teacher", "student", "host")),
        line_of("device", runs, of_run("device_name")),
        line_of("precision", runs, of_run("precision")),
        line_of("contract", runs, lambda run: text_cell(run.manifest.contract_sha256[:12] if run.manifest else None)),
        *(
            line_of(name, runs, version(name))
            for name in dict.fromkeys(name for run in runs for name in _versions(run))
        ),
    ]
    return Section("run", known(lines))


def _versions(run: LoadedRun) -> dict[str, str | None]:
    told = run.state.run.versions if run.state.run else {}
    return {**(run.manifest.versions if run.manifest else {}), **told}


def _count(value: int | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:,}", value)


# Speed


def _speed(runs: Sequence[LoadedRun]) -> Section:
    def rate(run: LoadedRun, column: str) -> Cell:
        seconds, amount = _steady(run.state, "seconds"), _steady(run.state, column)
        if not len(seconds) or seconds.sum() <= 0:
            return Cell()
        value = float((amount.sum() if column == "tokens" else len(seconds)) / seconds.sum())
        return Cell(f"{value:,.0f}" if value >= 1_000 else number(value), value)

    def peak(run: LoadedRun) -> Cell:
        summary = run.state.end.summary if run.state.end else {}
        value = summary.get("peak_device_bytes", summary.get("peak_rss_bytes"))
        return Cell() if value is None else Cell(size(value), value)

    def projected(run: LoadedRun) -> Cell:
        p = run.state.projection
        if p is None:
            return Cell()
        around = f"{duration(p.p10_seconds)} to {duration(p.p90_seconds)}"
        return Cell(f"{duration(p.p50_seconds)} ({around})", p.p50_seconds)

    def target(run: LoadedRun) -> Cell:
        return _count(run.state.projection.target_steps if run.state.projection else None)

    lines = [
        line_of("tokens/s", runs, lambda run: rate(run, "tokens"), measured=True),
        line_of("steps/s", runs, lambda run: rate(run, "seconds"), measured=True),
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
        mark = verdict_mark(verdict.verdict)
        return Cell(f"{mark.glyph} {mark.word}", mark.word, mark.style)

    identifiers = dict.fromkeys(identifier for each in judged for identifier in each)
    lines = tuple(Line(name, tuple(cell(name, index) for index in range(len(runs)))) for name in identifiers)
    contracts = {run.manifest.contract_sha256 for run in runs if run.manifest}
    note = "the contracts differ: the same name may stand for another check" if len(contracts) > 1 else ""
    return Section("verdicts", lines, note)


def _configuration(runs: Sequence[LoadedRun]) -> Section:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    lines = (line_of(key, runs, lambda run, key=key: _setting(run, key)) for key in keys)  # type: ignore[misc]
    unread = "; ".join(f"{run.label}: {run.config_problem}" for run in runs if run.config_problem)
    different = tuple(line for line in lines if line.differs)
    same = "" if different or unread or len(runs) < 2 else "no key differs"
    return Section("configuration, keys that differ", different, unread or same)


def _setting(run: LoadedRun, key: str) -> Cell:
    if key not in run.config:
        return Cell()
    value = run.config[key]
    plain = value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return Cell("none" if value is None else str(value), "none" if value is None else plain)
