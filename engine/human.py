"""The lines that a person greps for, in the words that training logs of this field have used all along."""

from __future__ import annotations

import math

from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    Control,
    Efficiency,
    End,
    Eval,
    Event,
    Log,
    Phase,
    Problem,
    Progress,
    Projection,
    Run,
    Step,
    Verdict,
)


def human_lines(event: Event, run: Run | None) -> list[str]:
    """What to print for an event; empty for those that only machines read.

    Args:
        event: any event of the stream.
        run: the run's first event, once known: it says of how many steps this is one, and whether it is a smoke.
    """
    if isinstance(event, Step):
        return [f"  Step {event.step}/{run.steps_asked if run else 0}: loss: {event.loss:.4f}"]
    if isinstance(event, Efficiency):
        return [efficiency_line(event)]
    if isinstance(event, Progress):
        share = f" ({event.done / event.total:.1%})" if event.total > 0 else ""
        left = "" if event.seconds_left is None else f", {event.seconds_left:.0f} s left"
        return [f"  {event.done}/{event.total} {event.unit}{share}{left}"]
    if isinstance(event, Control):
        return [control_line(event)]
    if isinstance(event, Problem):
        why = f": {event.detail}" if event.detail and not event.passed else ""
        return [f"  {event.task} answer {event.sample}: {event.outcome}{why}"]
    if isinstance(event, Phase):
        return [f"phase {event.name}" + (f": {event.detail}" if event.detail else "")]
    if isinstance(event, Run) and event.mode == "prepare":
        return [f"prepare of {event.teacher}: {event.device} ({event.device_name}), {event.precision}"]
    if isinstance(event, Run) and event.mode in ("evaluate", "publish"):
        against = f" against {event.teacher}" if event.teacher else ""
        return [f"{event.mode} of {event.student}{against}: {event.device} ({event.device_name}), {event.precision}"]
    if isinstance(event, Run):
        return [
            f"{event.mode} of {event.student} on {event.teacher or 'no teacher'}: "
            f"{event.device} ({event.device_name}), {event.precision}, {event.tokens_per_step:,} tokens a step"
        ]
    if isinstance(event, Eval):
        agreement = "" if event.agreement is None else f", top-1 agreement {event.agreement:.1%}"
        losses = f"loss {event.loss:.4f}, ce {event.ce:.4f}, kd {event.kd:.4f}"
        return [f"held-out at step {event.step}: {losses}{agreement}"]
    if isinstance(event, Checkpoint):
        return [f"[PMAT-699] checkpoint saved at step {event.step}: {event.path}"]
    if isinstance(event, CheckpointFailed):
        # The words end like this in every log of the field; after the last step there is no training to go on.
        goes_on = " (training continues)" if {"periodic", "best"}.intersection(event.kind.split("+")) else ""
        return [f"[PMAT-699] checkpoint save at step {event.step} failed: {event.error}{goes_on}"]
    if isinstance(event, Verdict):
        return [f"{event.verdict} {event.id}: expected {event.expected}, observed {event.observed}"]
    if isinstance(event, Log):
        return [f"{event.level}: {event.message}"]
    if isinstance(event, Projection) and run and run.mode == "smoke":
        return [projected_line(event)]
    if isinstance(event, End):
        closing = f"{event.status}: {event.reason} ({event.steps} steps, {event.seconds:.1f}s)"
        summary = _Summary(event.summary)
        if "final_loss" not in summary:
            return [closing]
        if run and run.mode == "smoke":
            return [smoke_line(event), closing]
        if event.status != "COMPLETED":
            return [closing]
        return [
            f"✓ Distillation complete: initial_loss={summary['initial_loss']:.4f} → "
            f"final_loss={summary['final_loss']:.4f} ({event.steps} steps, {event.seconds:.1f}s)",
            closing,
        ]
    return []


class _Summary(dict[str, float]):
    """A summary in which what was not said is NaN: a stream may come from another writer."""

    def __missing__(self, key: str) -> float:
        return math.nan


def efficiency_line(event: Efficiency) -> str:
    """Tokens a second, model FLOP utilisation with what it is held against, and milliseconds of a step by part."""
    peak = f" of {event.peak_flops / 1e12:.4g} TFLOP/s" if event.peak_flops else ""
    used = "" if event.mfu is None else f", MFU {event.mfu:.1%}{peak}"
    split = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in event.split.items())
    return f"  Speed at step {event.step}: {event.tokens_per_second:,.0f} tokens/s{used}" + (
        f"; ms a step: {split}" if split else ""
    )


def control_line(event: Control) -> str:
    """What a control scored; one that did not score what it must begins with words that nobody reads over."""
    held = event.observed == event.expected
    why = f": {event.detail}" if event.detail and not held else ""
    scored = f"scored {event.observed:.4g}, must be {event.expected:g} ({event.problems:,} problems)"
    return f"{'control' if held else 'CONTROL OFF'} {event.name}: {scored}{why}"


def smoke_line(end: End) -> str:
    """Steps, seconds of training, first and last loss and throughput of a smoke."""
    s = _Summary(end.summary)
    return (
        f"[SMOKE] {end.steps} steps in {s['train_seconds']:.2f}s: initial_loss={s['initial_loss']:.4f}, "
        f"final_loss={s['final_loss']:.4f}, throughput={s['steps_per_second']:.2f} step/s"
    )


def projected_line(projection: Projection) -> str:
    """The projected wall time, in hours, minutes and seconds."""
    seconds = projection.p50_seconds
    return (
        f"[SMOKE] projected full-run wall time ({projection.target_steps} steps): "
        f"{seconds / 3600:.2f}h / {seconds / 60:.1f} min / {seconds:.1f}s"
    )
