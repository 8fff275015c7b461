"""Runs that tell how fast they are, or how far their work without steps has come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.efficiency import Meter
from engine.flops import Flops, Peak, peak_flops
from engine.stream import Event, Heartbeat, Phase, Progress, Step
from tests.console.run_dirs import (
    ending,
    held_out,
    live,
    make_run,
    opening,
    shifted,
    steps_between,
    train_contract,
    train_events,
)
from tests.streams import EPOCH, run_event, stamped, with_verdicts

H100 = "NVIDIA H100 80GB HBM3"
PEAK = peak_flops(H100, "bf16")
CODER = Flops(6.05e9, "6 x 0.494 B + 2 x 1.544 B")
SPLIT = {"data": 0.01, "teacher": 0.22, "student": 0.16, "loss": 0.18, "backward": 0.35, "optimizer": 0.05}
"""Shares of a step; the rest is other."""
RUN = {"device": "cuda", "device_name": H100, "precision": "bf16", "tokens_per_step": 8_192}
RUN |= {"teacher": "/models/Qwen2.5-Coder-1.5B", "student": "/models/Qwen2.5-Coder-0.5B"}


def with_pace(events: Sequence[Event], peak: Peak | None = PEAK, seconds: float = 0.125) -> list[Event]:
    """The events with what a meter says of their steps, each taking so many seconds for 8,192 tokens."""
    meter, told = Meter(CODER, peak), list[Event]()
    for event in events:
        told.append(event)
        if isinstance(event, Step) and meter.add(event.step, 8_192, seconds):
            steps = meter.pending
            parts = {name: share * seconds * steps for name, share in SPLIT.items()}
            told.append(msgspec.structs.replace(meter.event(steps, parts), t=event.t))
    return told


def fast_run(evidence: Path, steps: int = 200, peak: Peak | None = PEAK, **options: object) -> Path:
    """A full run that passed and told its speed."""
    events = stamped(with_pace(train_events(steps, **RUN), peak))
    whole = with_verdicts(events, train_contract(), ending(steps))
    return make_run(evidence, whole, 0, "train", **{"name": "fast", **options})  # type: ignore[arg-type]


def fast_live_run(evidence: Path, last_t: float, peak: Peak | None = PEAK) -> Path:
    """A full run that is training and tells its speed."""
    begin = [*opening(50_000, **RUN), Phase(name="baseline-evaluation"), held_out(0, 9.0), Phase(name="train")]
    events = live(stamped(with_pace([*begin, *steps_between(1, 120)], peak)), train_contract())
    return make_run(evidence, shifted(events, last_t - events[-1].t), None, "train", living=True, name="fast")


def prepare_events(reports: int, total: int = 8_192, **run: object) -> list[Event]:
    """What a preparation tells that stores 64 windows in ten seconds and goes on."""
    t = EPOCH
    events: list[Event] = [Phase(name="import", t=t), run_event(t=t + 1, mode="prepare", target_steps=0, **run)]
    events += [Phase(name="load-teacher", budget_seconds=600.0, t=t + 1), Phase(name="store", t=t + 5)]
    for number in range(1, reports + 1):
        t, done = EPOCH + 5 + 10 * number, min(total, 64 * number)
        left = (total - done) / 6.4
        made = Progress(done=done, total=total, unit="windows", seconds=10.0 * number, seconds_left=left, t=t)
        events += [made, Heartbeat(phase="store", step=0, rss_bytes=2 << 30, t=t)]
    return stamped(events)


def prepare_run(evidence: Path, reports: int, last_t: float) -> Path:
    """A preparation that stores a teacher and goes on."""
    told = prepare_events(reports, **RUN)
    return make_run(
        evidence, shifted(told, last_t - told[-1].t), None, "prepare", living=True, sets=["teacher.source=hidden"]
    )
