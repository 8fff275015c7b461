"""From the step times of a smoke to the wall time of the real run, with a range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.stream import Projection

MIN_STEPS = 10
"""Fewer steps than this and there is no projection: nothing would remain once the warm-up is left out."""

_RESAMPLES = 2_000
_BLOCKS = 10


@dataclass(frozen=True)
class FixedCosts:
    """What the real run spends outside of its steps, each at its measured cost in seconds."""

    start_seconds: float
    """Imports, self-check, loading and tokenising: once."""
    evaluation_seconds: float
    evaluations: int
    checkpoint_seconds: float
    checkpoints: int

    @property
    def total_seconds(self) -> float:
        """All of it, in seconds."""
        return (
            self.start_seconds + self.evaluation_seconds * self.evaluations + self.checkpoint_seconds * self.checkpoints
        )


def warm_up_steps(step_seconds: Sequence[float]) -> int:
    """How many first steps to leave out: at least 2, a tenth of all, and as many as are compile outliers.

    Compilation and autotuning come first and are much longer than what follows, so every leading step of more than
    three times the median of the second half is left out too, up to half of all.
    """
    count = len(step_seconds)
    steady = float(np.median(step_seconds[count // 2 :]))
    leading = 0
    while leading < count // 2 and step_seconds[leading] > 3 * steady:
        leading += 1
    return min(max(2, count // 10, leading), count // 2)


def project(step_seconds: Sequence[float], target_steps: int, fixed: FixedCosts, seed: int = 0) -> Projection | None:
    """Projected wall time of a run of `target_steps`.

    The total of many steps is their number times the mean step, and slow spells last longer than one step; so whole
    blocks of consecutive steps are resampled (moving-block bootstrap) and each resample's mean gives one total. The
    percentiles are taken over those totals.

    Args:
        step_seconds: wall seconds of each step of the smoke, from the first on.
        target_steps: steps of the run to project.
        fixed: costs outside of the steps.
        seed: of the resampling, so that a replay gives the same figures.

    Returns:
        The projection, or None for fewer than `MIN_STEPS` steps.

    Source: Künsch (1989), "The jackknife and the bootstrap for general stationary observations".
    """
    if len(step_seconds) < MIN_STEPS:
        return None
    steady = np.asarray(step_seconds[warm_up_steps(step_seconds) :], dtype=np.float64)
    block = max(1, len(steady) // _BLOCKS)
    starts = np.random.default_rng(seed).integers(0, len(steady) - block + 1, size=(_RESAMPLES, _BLOCKS))
    sums = np.concatenate(([0.0], np.cumsum(steady)))
    means = ((sums[starts + block] - sums[starts]) / block).mean(axis=1)
    p10, p50, p90 = np.percentile(means, [10, 50, 90]) * target_steps + fixed.total_seconds
    return Projection(
        target_steps=target_steps,
        p10_seconds=float(p10),
        p50_seconds=float(p50),
        p90_seconds=float(p90),
        step_seconds=float(np.median(steady)),
        fixed_seconds=fixed.total_seconds,
        samples=len(steady),
    )
