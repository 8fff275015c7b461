"""Streams of runs that never were, for every test that needs one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec

from engine.falsifiers import JUDGE_PHASE, Contract, Judge, builtin_contract, parse_contract
from engine.stream import End, Eval, Event, Heartbeat, Log, Measure, Phase, Projection, Run, Step

RUN = "11111111-2222-4333-8444-555555555555"
EPOCH = 1_760_000_000.0
SELF_CHECKS = {
    "ce_gradient_error": 1e-7,
    "self_gradient": 0.0,
    "kd_gradient_error": 1e-6,
    "smallest_kd_growth": 0.2,
    "smallest_logit_rise": 0.5,
    "ten_step_loss_ratio": 0.4,
}


def run_event(**changes: object) -> Run:
    run = Run(
        attempt=1,
        mode="smoke",
        config="c" * 64,
        gate="d" * 64,
        contract="e" * 64,
        teacher="builtin:teacher",
        student="builtin:student",
        host="box",
        device="cpu",
        device_name="Some CPU",
        precision="fp32",
        versions={"torch": "2.13.0"},
        target_steps=50_000,
        budget_seconds=60.0,
        temperature=4.0,
        alpha=0.3,
        tokens_per_step=8_192,
    )
    return msgspec.structs.replace(run, **changes)


@functools.cache
def smoke_contract() -> Contract:
    return parse_contract(builtin_contract("smoke"), "smoke.yaml")


def step_event(step: int, loss: float, seconds: float = 0.5) -> Step:
    return Step(step=step, loss=loss, ce=loss + 1, kd=loss - 1, lr=1e-4, grad_norm=1.0, tokens=8_192, seconds=seconds)


def eval_event(step: int, loss: float, cosine: float | None = 0.5) -> Eval:
    agreement = None if cosine is None else cosine / 2
    return Eval(step=step, loss=loss, ce=loss, kd=loss, agreement=agreement, cosine=cosine, tokens=1_000, seconds=1.0)


def smoke_events(
    steps: int = 10,
    *,
    loss: Callable[[int], float] = lambda step: 5.0 - 0.1 * step,
    reason: str = "budget",
    **run: object,
) -> list[Event]:
    """What the trainer emits in a good smoke of so many steps, stamped, without verdicts and without `end`."""
    teacher = run.get("teacher", "builtin:teacher") is not None
    cosine = (lambda value: value) if teacher else (lambda value: None)
    events: list[Event] = [Phase(name="import"), Heartbeat(phase="import", step=0, rss_bytes=1 << 20), run_event(**run)]
    events += [Phase(name="self-check"), *(Measure(name=name, value=value) for name, value in SELF_CHECKS.items())]
    events += [Phase(name="load-teacher"), Phase(name="load-student")]
    if teacher:
        events.append(Measure(name="teacher_logit_error", value=0.0))
        events.append(Measure(name="teacher_student_distance", value=1.0))
    events += [Measure(name="student_logit_error", value=0.0), Log(level="info", message="596 files")]
    events += [Phase(name="baseline-evaluation"), eval_event(0, 5.0, cosine(0.1)), Phase(name="train")]
    events += [step_event(step, loss(step)) for step in range(1, steps + 1)]
    events += [Phase(name="final-evaluation"), eval_event(steps, loss(steps), cosine(0.6))]
    events.append(Measure(name="steps_per_second", value=2.0))
    events.append(Phase(name="projection"))
    if steps >= 10:
        events.append(
            Projection(
                target_steps=50_000,
                p10_seconds=24_000.0,
                p50_seconds=25_000.0,
                p90_seconds=26_000.0,
                step_seconds=0.5,
                fixed_seconds=30.0,
                samples=steps - 2,
            )
        )
    events += [Measure(name="model_files", value=0.0), Phase(name=JUDGE_PHASE, detail=reason)]
    return stamped(events)


def end_event(steps: int = 10, **changes: object) -> End:
    end = End(
        status="COMPLETED",
        reason="the time budget is reached",
        exit_code=0,
        steps=steps,
        seconds=40.0,
        summary={
            "train_seconds": 20.0,
            "initial_loss": 4.9,
            "final_loss": 4.0,
            "steps_per_second": 0.5,
            "tokens_per_second": 4_096.0,
            "peak_rss_bytes": float(1 << 30),
        },
    )
    return msgspec.structs.replace(end, **changes)


def stamped(events: list[Event], start: float = EPOCH, apart: float = 0.5) -> list[Event]:
    """The events with run, seq and a time `apart` seconds after the one before; a time that one has is kept."""
    return [
        msgspec.structs.replace(event, run=RUN, seq=seq, t=event.t or start + seq * apart)
        for seq, event in enumerate(events)
    ]


def with_verdicts(events: list[Event], contract: Contract | None = None, end: End | None = None) -> list[Event]:
    """The stream as the engine writes it: each verdict after the event that changed it, and the end."""
    judge = Judge(contract or smoke_contract())
    whole: list[Event] = []
    for event in events:
        whole.append(event)
        whole += [msgspec.structs.replace(verdict, t=event.t) for verdict in judge.observe(event)]
    whole.append(msgspec.structs.replace(end or end_event(), t=events[-1].t + 1))
    return stamped(whole)
