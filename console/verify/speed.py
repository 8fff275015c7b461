"""What a stream says of its speed, held against the steps that it is of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.stream import Efficiency

if TYPE_CHECKING:
    from console.verify.fold import Attempt

_TOLERANCE = 1e-6


def wrong(event: Efficiency, attempt: Attempt) -> str:
    """What of an event does not follow from the steps of its attempt, peak and cost of a token being as stated.

    Empty where all of it does: tokens a second, utilisation, and parts of a step that add up to its mean.
    """
    made, steps = attempt.steps, event.steps
    if not made or event.step != made[-1]:
        return f"of step {event.step}, expected the last one made, {made[-1] if made else 'none'}"
    if not 0 < steps <= len(made):
        return f"a mean of {steps:,} steps, of {len(made):,} made"
    took = math.fsum(attempt.seconds[-steps:])
    tokens = steps * (attempt.run.tokens_per_step if attempt.run else 0)
    if not took > 0 or not _close(event.tokens_per_second, tokens / took):
        return f"{event.tokens_per_second} tokens/s, expected {tokens / took if took > 0 else math.nan}"
    if (event.mfu is None) != (event.peak_flops is None):
        return "utilisation and peak belong together"
    if event.mfu is not None and event.peak_flops is not None:
        used = tokens / took * event.flops_per_token / event.peak_flops if event.peak_flops > 0 else math.nan
        if not _close(event.mfu, used):
            return f"utilisation {event.mfu}, expected {used}"
    parts = math.fsum(event.split.values())
    if event.split and not _close(parts, took / steps):
        return f"parts of {parts} s, expected {took / steps} s, the mean step"
    return ""


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_TOLERANCE)
