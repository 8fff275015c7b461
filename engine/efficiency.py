"""Speed, split and utilisation of the last steps, added up step by step and told every ten seconds of training.

The trainer's part:

    if meter.add(step, tokens, seconds):            # after the figures of each step were read
        recorder.emit(meter.event(*clock.take()))
    elif meter.warming:                             # the first step: its compilation is nobody's speed
        clock.take()
    ...
    if meter.pending:                               # once, at the end of training
        recorder.emit(meter.event(*clock.take()))
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.flops import Flops, Peak
from engine.stream import Efficiency

FIRST_AFTER_STEPS = 10
EVERY_SECONDS = 10.0
OTHER = "other"


class Meter:
    """Means over the steps since the event before.

    The first step of an attempt is left out: it compiles, allocates and fills caches. Time is that of the steps
    themselves, so that evaluations and checkpoints between them slow nothing down here.
    """

    def __init__(self, flops: Flops, peak: Peak | None, devices: int = 1) -> None:
        """Sets up for one attempt.

        Args:
            flops: of one token.
            peak: of one device; None where nobody knows it.
            devices: how many share the work.
        """
        self.warming = False
        """Whether the step added last was the one left out."""
        self._flops, self._peak, self._devices = flops, peak, devices
        self._warm = self._told = False
        self._step = self._steps = self._tokens = 0
        self._seconds = 0.0

    @property
    def pending(self) -> int:
        """Steps that no event has told of yet."""
        return self._steps

    def add(self, step: int, tokens: int, seconds: float) -> bool:
        """Takes one step in; True when an event is due.

        Args:
            step: its number.
            tokens: of the whole step, over all devices.
            seconds: that it took.
        """
        self.warming = not self._warm
        self._warm = True
        if self.warming:
            return False
        self._step, self._steps = step, self._steps + 1
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        # The step left out counts as the first of ten.
        return self._seconds >= EVERY_SECONDS or (not self._told and self._steps + 1 >= FIRST_AFTER_STEPS)

    def event(self, steps: int, split: Mapping[str, float]) -> Efficiency:
        """The means since the last event; a new window begins.

        Args:
            steps: that `split` is of. A clock that is read late may have seen some other number than this meter.
            split: seconds in all of those steps, by name.

        Raises:
            ValueError: no step was added since the last event.
        """
        if not self._steps:
            raise ValueError("no step since the last efficiency event")
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        peak = None if self._peak is None else self._peak.flops * self._devices
        source = "" if self._peak is None else self._peak.source
        event = Efficiency(
            step=self._step,
            steps=self._steps,
            tokens_per_second=rate,
            mfu=None if peak is None else rate * self._flops.total / peak,
            flops_per_token=self._flops.total,
            peak_flops=peak,
            peak_source=f"{self._devices} x {source}" if source and self._devices > 1 else source,
            formula=self._flops.formula,
            split=_parts(self._seconds / self._steps, steps, split),
        )
        self._told = True
        self._steps = self._tokens = 0
        self._seconds = 0.0
        return event


def _parts(mean: float, steps: int, split: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a mean step by name, with what is left of it as `other`."""
    parts = {name: max(0.0, seconds) / steps for name, seconds in split.items()} if steps > 0 else {}
    measured = sum(parts.values())
    if measured > mean:
        # A device's own clock and the host's, or windows that are a step apart: what counts is the share.
        return {name: seconds * mean / measured for name, seconds in parts.items()} | {OTHER: 0.0}
    return parts | {OTHER: mean - measured}
