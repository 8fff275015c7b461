"""Training from one look at its results to the next: batches in, steps launched, what they came to told in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from engine.checkpoint import OrderState
from engine.efficiency import Meter
from engine.errors import DataError, ExitCode, KdError
from engine.feed import Fed, Feed
from engine.keeper import Totals
from engine.projection import MIN_STEPS
from engine.recorder import Recorder
from engine.step import Figures, Stepper
from engine.step_clock import StepClock
from engine.stream import Step
from engine.windows import degenerate


class Ended(Exception):
    """The run ends before its last phase."""

    def __init__(self, status: str, reason: str, exit_code: ExitCode) -> None:
        super().__init__(reason)
        self.status, self.reason, self.exit_code = status, reason, exit_code


class Training:
    """The steps of an attempt and the account of them; `settle` before anything looks at the weights.

    Args:
        stepper: makes the steps.
        feed: gives the batches; closed with this.
        clock: that the stepper tells of its time.
        meter: tells how fast it goes.
        totals: brought forward with every step whose figures are known.
        recorder: told of each.
    """

    def __init__(
        self, stepper: Stepper, feed: Feed, clock: StepClock, meter: Meter, totals: Totals, recorder: Recorder
    ) -> None:
        self.stepper, self._feed, self._clock, self._meter = stepper, feed, clock, meter
        self._totals, self._recorder = totals, recorder
        self._trained = totals.train_seconds
        self._started = self._last = time.monotonic()
        self.step_seconds: list[float] = []
        """Of each step, from the end of the one before to its own; what came between the two is left out."""

    @property
    def pending(self) -> int:
        """Steps that were launched and are not accounted for yet."""
        return self.stepper.launched

    def step(self, step: int, rate: float) -> OrderState:
        """Launches a step, and accounts for those that are done.

        Returns:
            Where the order of the data stands after its batch.

        Raises:
            Ended: a loss is not finite; no weight has changed since before its step.
            DataError: the corpus begins with a batch that nothing can be learnt from.
        """
        try:
            with self._clock.region("data"):
                fed = self._feed.take()
            self._refuse_degenerate(step, fed)
        except KdError:
            self.settle()  # the step before is as whole as it would be on a machine that waits for each
            raise
        self.stepper.launch(step, rate, fed)
        self._account(self.stepper.ready())
        return fed.order

    def settle(self) -> None:
        """Waits until every step launched is done and accounted for.

        Raises:
            Ended: as `step` does.
        """
        self._account(self.stepper.flush())

    def go_on(self) -> None:
        """Time since the last step was not that of a step."""
        self._last = time.monotonic()

    def finish(self) -> None:
        """Settles the last steps.

        Raises:
            Ended: as `step` does.
        """
        self.settle()
        self._totals.train_seconds = self._trained + time.monotonic() - self._started
        if self._meter.pending:
            self._recorder.emit(self._meter.event(*self._clock.take()))

    def close(self) -> None:
        """Ends what runs beside the steps."""
        self._feed.close()

    def _account(self, made: Iterable[Figures]) -> None:
        for figures in made:
            now = time.monotonic()
            seconds, self._last = now - self._last, now
            self.step_seconds.append(seconds)
            self._tell(figures, seconds, now)

    def _tell(self, figures: Figures, seconds: float, now: float) -> None:
        totals, finite = self._totals, math.isfinite(figures.loss)
        if finite:  # the weights of a step that is none are those from before it
            totals.learned = totals.learned or figures.rate > 0
            totals.train_seconds = self._trained + now - self._started
        tokens = figures.tokens
        totals.tokens += tokens
        totals.step, totals.final_loss = figures.step, figures.loss if finite else None
        if figures.step == 1:
            totals.initial_loss = totals.final_loss
        self._recorder.emit(
            Step(
                step=figures.step,
                loss=figures.loss,
                ce=figures.ce,
                kd=figures.kd,
                lr=figures.rate,
                grad_norm=figures.norm,
                tokens=tokens,
                seconds=seconds,
            )
        )
        if not finite:
            reason = f"the loss of step {figures.step} is {figures.loss}; weights kept as before it"
            raise Ended("FAILED", reason, ExitCode.FAILED)
        if self._meter.add(figures.step, tokens, seconds):
            self._recorder.emit(self._meter.event(*self._clock.take()))
        elif self._meter.warming:
            self._clock.take()

    def _refuse_degenerate(self, step: int, fed: Fed) -> None:
        """Refuses a corpus that begins with useless batches; a stray one in the middle of a long run is only told."""
        problem = degenerate(fed.windows)
        if problem is None:
            return
        what = f"the batch of step {step} is degenerate: {problem}"
        if step <= MIN_STEPS:
            raise DataError(f"data: {what}", do="check the corpus")
        self._recorder.log(what, "warning")
