"""What a run tells of its speed, as texts: tokens a second, utilisation and its basis, where a step's time went."""

from __future__ import annotations

import math
from typing import Any

from engine.stream import Efficiency


def speed(event: Efficiency) -> str:
    """`12,345 tokens/s`; empty where that is no number."""
    rate = event.tokens_per_second
    return f"{rate:,.0f} tokens/s" if rate >= 99.95 else f"{rate:.3g} tokens/s" if math.isfinite(rate) else ""


def utilisation(event: Efficiency) -> float | None:
    """MFU as a fraction; None where no peak is known, or it is no number."""
    return event.mfu if event.mfu is not None and math.isfinite(event.mfu) else None


def peak(event: Efficiency) -> str:
    """`989.5 TFLOP/s`; empty where none is known."""
    value = event.peak_flops
    if value is None or not math.isfinite(value) or value <= 0:
        return ""
    return f"{value / 1e12:.4g} TFLOP/s" if value >= 1e11 else f"{value / 1e9:.3g} GFLOP/s"


def per_token(event: Efficiency) -> str:
    """`6.05 GFLOP a token`; empty where nobody says it."""
    value = event.flops_per_token
    if not math.isfinite(value) or value <= 0:
        return ""
    return f"{value / 1e9:.3g} GFLOP a token" if value >= 1e8 else f"{value / 1e6:.3g} MFLOP a token"


def counted(event: Efficiency) -> str:
    """`6 x 0.494 B + 2 x 1.544 B = 6.05 GFLOP a token`, or what is known of it."""
    return " = ".join(text for text in (event.formula, per_token(event)) if text)


def shares(event: Efficiency) -> list[tuple[str, float]]:
    """Names of the parts of a step and their shares of it, 0 to 1, in the order of the step."""
    total = sum(event.split.values())
    return [(name, s / total) for name, s in event.split.items()] if math.isfinite(total) and total > 0 else []


def split_text(event: Efficiency, between: str = ", ") -> str:
    """`data 1%, teacher 22%, …`; empty where it is not told."""
    return between.join(f"{name} {share:.0%}" for name, share in shares(event))


def step_seconds(event: Efficiency) -> float:
    """Seconds of the mean step; NaN where its split is not told."""
    return sum(event.split.values()) if event.split else math.nan


def seconds(value: float) -> str:
    """What a step or a part of one takes: `128 ms`, `1.87 s`."""
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.4g} s"


def basis(event: Efficiency) -> str:
    """The peak and where it is from: `46.6 GFLOP/s (measured: …)`; empty where none is known."""
    told = peak(event)
    return f"{told} ({event.peak_source})" if told and event.peak_source else told


def facts(event: Efficiency | None) -> list[tuple[str, str]]:
    """Lines of a report: utilisation and what it is held against, then the step and its parts; names and texts."""
    if event is None:
        return []
    used = utilisation(event)
    told = "MFU n/a: no peak is known of the device" if used is None else f"MFU {used:.1%} of {basis(event)}"
    if per := counted(event):
        told += f"; {per}"
    found = [("efficiency", told)]
    step = step_seconds(event)
    if math.isfinite(step):
        found.append(("a step", f"{seconds(step)}: {split_text(event)}"))
    return found


def document(event: Efficiency | None) -> dict[str, Any] | None:
    """What a program is told of a run's speed; None where the run did not tell it. `split` is seconds of a step."""
    if event is None:
        return None
    return {
        "steps": event.steps,
        "tokens_per_second": event.tokens_per_second if math.isfinite(event.tokens_per_second) else None,
        "mfu": utilisation(event),
        "flops_per_token": event.flops_per_token if math.isfinite(event.flops_per_token) else None,
        "formula": event.formula or None,
        "peak_flops": event.peak_flops if peak(event) else None,
        "peak_source": event.peak_source or None,
        "split": dict(event.split),
    }
