"""Views of runs that never were, and an app with one pane in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from textual.app import App, ComposeResult
from textual.widget import Widget

from console.run_state import Reducer, RunState
from console.themes import THEMES
from console.view import Link, View
from engine.falsifiers import Contract, Judge, builtin_contract, parse_contract
from engine.stream import Checkpoint, CheckpointFailed, Eval, Event, Heartbeat, Log, Phase, Step, Verdict, Vitals
from tests.streams import EPOCH, RUN, run_event

HOSTILE = (
    "[red]x[/]",
    "[link=file:///etc/passwd]click[/link]",
    "[/]",
    "漢字" * 40,
    "👩‍🚀🚀" * 20,
    "e\u0301" * 60,
    "x" * 500,
    "\u200b\u200b",
    "$error {0} %s \\[",
)
"""Texts that a pane must show as they are, and cut by cells."""
SHAPES = [(30, 4), (60, 20), (80, 24), (240, 70)]


@functools.cache
def contract() -> Contract:
    return parse_contract(builtin_contract("train"), "train.yaml")


def train_events(
    steps: int = 1_200,
    *,
    seconds: Callable[[int], float] = lambda step: 1.0 + 0.1 * (step % 7),
    loss: Callable[[int], float] = lambda step: 2.0 + 8.0 / (1 + step / 40),
    evaluate_every: int = 500,
    checkpoint_every: int = 400,
    failed: Sequence[int] = (),
    start: float = EPOCH,
    **run: Any,
) -> list[Event]:
    """The stream of a full run that has made so many steps and goes on, stamped, with the engine's verdicts."""
    run = {"mode": "train", "target_steps": 5_000, "budget_seconds": None, **run}
    t = start
    events: list[Event] = [Phase(name="import", t=t), Heartbeat(phase="import", step=0, rss_bytes=10**9, t=t)]
    events += [run_event(t=t + 4, **run), Phase(name="load-student", budget_seconds=1_800.0, t=t + 5)]
    t += 10
    events += [Phase(name="baseline-evaluation", budget_seconds=1_800.0, t=t), evaluation(0, loss(0), t + 10)]
    t += 10
    events.append(Phase(name="train", t=t))
    beat = t
    for step in range(1, steps + 1):
        t += seconds(step)
        while t - beat > 5:
            beat += 5
            events.append(heartbeat(beat, step=step - 1))
        events.append(
            Step(
                step=step,
                loss=loss(step),
                ce=loss(step),
                kd=loss(step),
                lr=1e-4,
                grad_norm=1.0,
                tokens=8_192,
                seconds=seconds(step),
                t=t,
            )
        )
        if step % evaluate_every == 0:
            t += 10
            events.append(evaluation(step, loss(step), t))
        if step % checkpoint_every == 0:
            t += 0.2
            kind = "best+periodic" if step % (3 * checkpoint_every) == 0 else "periodic"
            events.append(failure(step, t=t) if step in failed else checkpoint(step, kind=kind, t=t))
    judge = Judge(contract())
    whole: list[Event] = []
    for event in events:
        whole.append(event)
        whole += [msgspec.structs.replace(v, t=event.t) for v in judge.observe(event)]
    return numbered(whole)


def numbered(events: Sequence[Event]) -> list[Event]:
    return [msgspec.structs.replace(event, run=RUN, seq=seq) for seq, event in enumerate(events)]


def heartbeat(t: float, **changes: Any) -> Heartbeat:
    beat = Heartbeat(phase="train", step=0, rss_bytes=2_100_000_000, host_free_bytes=67_300_000_000, t=t)
    return msgspec.structs.replace(beat, **changes)


def evaluation(step: int, loss: float, t: float, seconds: float = 10.0) -> Eval:
    return Eval(step=step, loss=loss, ce=loss, kd=loss, agreement=0.3, cosine=0.5, tokens=1_000, seconds=seconds, t=t)


def checkpoint(step: int, **changes: Any) -> Checkpoint:
    whole = Checkpoint(
        step=step,
        kind="periodic",
        path=f"checkpoints/step-{step}",
        bytes=988_097_824,
        tensors=291,
        sha256="9f2c" + "0" * 60,
        seconds=4.1,
        waited_seconds=0.2,
    )
    return msgspec.structs.replace(whole, **changes)


def failure(step: int, **changes: Any) -> CheckpointFailed:
    failed = CheckpointFailed(step=step, kind="periodic", error="No space left on device", seconds=3.1)
    return msgspec.structs.replace(failed, **changes)


def vitals(**changes: Any) -> Vitals:
    whole = Vitals(
        cpu_percent=14.0,
        host_total_bytes=128_500_000_000,
        host_free_bytes=67_300_000_000,
        disk_free_bytes=412_000_000_000,
        disk_total_bytes=1_000_000_000_000,
        gpu_percent=97.0,
        gpu_temperature_c=71.0,
        gpu_power_watts=64.0,
        unified_memory=True,
    )
    return msgspec.structs.replace(whole, **changes)


def log_events(texts: Sequence[str], t: float = EPOCH, level: str = "info") -> list[Event]:
    return [Log(level=level, message=text, t=t + number) for number, text in enumerate(texts)]


def reduced(events: Sequence[Event], judged_by: Contract | None = None) -> RunState:
    return Reducer(judged_by or contract()).feed(events)


def view_of(events: Sequence[Event], after: float = 0.5, *, host: str = "gx10", **link: Any) -> View:
    """The view of a followed run so many seconds after its last event, the clocks of both machines being the same."""
    state = reduced(events)
    known = Link(host=host, status="running", heard=state.last_t, latency_seconds=0.038)
    return View(state=state, link=replace(known, **link), now=state.last_t + after)


def ended(view: View, **link: Any) -> View:
    """The same run as it is looked at once it is over."""
    known = {"status": "ended", "live": False, **link}
    return replace(view, link=replace(view.link, **known), now=view.state.last_t)


def verdict(identifier: str, word: str, **changes: Any) -> Verdict:
    whole = Verdict(
        id=identifier, verdict=word, severity="gate", claim="a claim", expected="< 3", observed="5.1", step=7
    )
    return msgspec.structs.replace(whole, **changes)


W = TypeVar("W", bound=Widget)


class Host(App[None]):
    """A pane and nothing else."""

    CSS = "Screen > * { height: 1fr; width: 1fr; } Screen > HeadLine { height: auto; }"

    def __init__(self, pane: Widget, theme: str = "kdconsole-dark") -> None:
        super().__init__()
        for each in THEMES:
            self.register_theme(each)
        self.theme = theme
        self.pane = pane

    def compose(self) -> ComposeResult:
        yield self.pane
