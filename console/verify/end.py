"""What a run says of itself at its end, computed anew from its steps: the summary, the projection, the exit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from console.verify.claims import Claim, close, compared, differs, same
from console.verify.fold import Attempt, Fold
from dispatch.manifest import EVENTS, ExitRecord
from engine.errors import ExitCode
from engine.falsifiers import exit_code_of
from engine.projection import FixedCosts, project
from engine.stream import End

PART = "end"
_ALWAYS = ("train_seconds", "initial_loss", "final_loss", "steps_per_second", "tokens_per_second")
"""What a run that came to its end sums up."""


def end_claims(fold: Fold, record: ExitRecord | None) -> Iterator[Claim]:
    """The last word of the stream: steps, losses, speed, projection, exit code.

    Args:
        fold: of the whole stream.
        record: how its process ended, as its supervisor saw it.
    """
    yield from _projection(fold)
    end = fold.end
    if end is None or not fold.attempts:
        return
    attempt = fold.attempts[-1]
    yield _steps(fold, attempt, end)
    yield from _summary(fold, attempt, end)
    if end.status == "COMPLETED" and fold.judged:
        yield compared(PART, "exit code by the verdicts", end.exit_code, int(exit_code_of(fold.judged)))
    elif end.exit_code == ExitCode.OK:
        yield differs(PART, "exit code", end.exit_code, "another one", f"a run that {end.status} did not end well")
    if record is not None and record.wrote and record.signal is None and record.error is None:
        yield compared(PART, "exit code by exit.json", end.exit_code, record.exit_code)


def _steps(fold: Fold, attempt: Attempt, end: End) -> Claim:
    """The last step; an attempt that ended before it made one says 0, or that of the checkpoint it went on from."""
    if attempt.steps:
        return compared(PART, "steps", end.steps, attempt.steps[-1])
    if end.steps in (0, attempt.resumed):
        return same(PART, "steps", end.steps)
    return differs(PART, "steps", end.steps, attempt.resumed or 0)


def _summary(fold: Fold, attempt: Attempt, end: End) -> Iterator[Claim]:
    told = end.summary
    for name in _ALWAYS if end.status == "COMPLETED" and fold.losses else ():
        if name not in told:
            yield differs(
                PART, name, "missing", "a number", f"{EVENTS}: the end of a run that was completed says {name}"
            )
    if not fold.losses:
        return
    steps, took = end.steps, max(told.get("train_seconds", math.nan), 1e-9)
    first, last = _loss(fold.losses[0]), _loss(fold.losses[-1])
    exact = {"initial_loss": first, "final_loss": last}
    if fold.evals and fold.evals[0].step == 0:
        exact |= {"heldout_initial": fold.evals[0].loss, "heldout_final": fold.evals[-1].loss}
    for name, value in exact.items():
        if name in told:
            yield compared(PART, name, told[name], value)
    if math.isfinite(took):
        for name, amount in (("steps_per_second", float(steps)), ("tokens_per_second", fold.tokens[-1])):
            if name in told:
                yield close(PART, name, told[name], amount / took)
        yield _seconds(fold, took)
    if attempt.speed is not None and "steps_per_second" in told:
        yield close(PART, "measure steps_per_second", attempt.speed, told["steps_per_second"])


def _seconds(fold: Fold, took: float) -> Claim:
    """Training takes as long as its steps at least: evaluations and checkpoints come between them."""
    least = fold.seconds()
    if took >= least * (1 - 1e-6) - 1e-3:
        return same(PART, "train_seconds", took, f"{least:.3f} or more")
    return differs(PART, "train_seconds", took, f"{least:.3f} or more", "the steps alone took longer")


def _projection(fold: Fold) -> Iterator[Claim]:
    """The projection, from the times of the steps; the costs around them are taken as stated."""
    stated = fold.projection
    if stated is None or not fold.attempts:
        return
    seconds = list(fold.attempts[-1].seconds)
    fixed = FixedCosts(stated.fixed_seconds, 0.0, 0, 0.0, 0)
    finite = all(map(math.isfinite, seconds)) and math.isfinite(stated.fixed_seconds)
    found = project(seconds, stated.target_steps, fixed) if finite else None
    if found is None:
        why = f"{len(seconds):,} steps were made before it, which are too few for one"
        yield differs(PART, "projection", f"{stated.p50_seconds} s", "none", why)
        return
    yield compared(PART, "projection samples", stated.samples, found.samples)
    for name in ("p10_seconds", "p50_seconds", "p90_seconds", "step_seconds"):
        yield close(PART, f"projection {name}", getattr(stated, name), getattr(found, name))


def _loss(value: float) -> float:
    return value if math.isfinite(value) else math.nan
