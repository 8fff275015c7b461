"""One optimizer step, launched without waiting for the device, and its figures, read when the device is done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.distill import Pair
from engine.feed import Fed
from engine.parallel import Gradients, Way, clip
from engine.ranks import ALONE, Ranks
from engine.step_clock import NO_CLOCK, StepClock

LAG: Final = {"cuda": 1}
"""Steps that may be launched on a kind of device before the figures of one are read; 0 for one that is not here."""


@dataclass(frozen=True)
class Figures:
    """What a step came to; losses in nats a token, over the whole batch.

    A `loss` that is not finite ends training: that step and all after it changed no weight. It is the gradient's norm
    where that alone is not finite.
    """

    step: int
    rate: float
    tokens: int
    loss: float
    ce: float
    kd: float
    norm: float


@dataclass(frozen=True)
class _Launched:
    """A step on its way: its figures in host memory, there once `arrived` has happened."""

    step: int
    rate: float
    tokens: int
    figures: Tensor
    arrived: torch.cuda.Event | None


class Stepper:
    """Makes a run's optimizer steps: micro-batches, losses, gradients, clipping, AdamW.

    Nothing in a step waits for a GPU: labels stay in CPU memory, token ids go over from pinned memory, and figures come
    back while the next step is being launched. A step whose loss or gradient is not finite must change nothing all the
    same, and neither must those that were launched before anybody could know: a flag on the device, once set for good,
    tells the fused AdamW to leave everything as it is, its moments and step counters included.

    Args:
        pair: teacher and student.
        optimizer: AdamW over the student's parameters.
        parts: micro-batches a step.
        clip: largest norm of the gradient; 0 for no limit.
        clock: told where the time goes.
        lag: steps that may be launched before the figures of one are read, `LAG` of the device unless given. Losses
            and weights are the same for any.
        ranks: of this process; with several, each takes its share of the windows.
        way: how they share: each a whole model (ddp) or a part of one (fsdp).
    """

    def __init__(
        self,
        pair: Pair,
        optimizer: torch.optim.Optimizer,
        *,
        parts: int = 1,
        clip: float = 0.0,
        clock: StepClock = NO_CLOCK,
        lag: int | None = None,
        ranks: Ranks = ALONE,
        way: Way = "single",
    ) -> None:
        self.pair, self._optimizer, self._parts, self._clip, self._clock = pair, optimizer, parts, clip, clock
        self._parameters = list(pair.student.model.parameters())
        self._device = self._parameters[0].device
        self._gpu = self._device.type == "cuda"
        self._lag = LAG.get(self._device.type, 0) if lag is None else lag
        self._launched: deque[_Launched] = deque()
        self._ranks = ranks
        self._gradients = Gradients(self._parameters) if way == "ddp" else None
        # 1.0 from the first loss or gradient on that is not finite.
        self._bad = torch.zeros((), device=self._device)
        # Where AdamW is not fused it knows no such flag, and the host has to look at it.
        self._flagged = all(group["fused"] for group in optimizer.param_groups)
        if self._flagged:
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    @property
    def launched(self) -> int:
        """Steps on their way: launched, and their figures not read yet."""
        return len(self._launched)

    def launch(self, step: int, rate: float, fed: Fed) -> None:
        """Launches one step; on a GPU it returns long before the step is done.

        Args:
            step: its number.
            rate: learning rate.
            fed: its batch. The loss of this device's windows is divided by the labelled tokens of all of them.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        tokens = fed.windows.shape[0] * (fed.windows.shape[1] - 1)
        sums = torch.zeros(3, device=self._device)
        for inputs, labels, stored, last in self._micro_batches(fed):
            loss = self.pair.loss(inputs, labels, tokens, stored, self._clock)
            with self._clock.region("backward"):
                if self._gradients is not None and last:
                    self._gradients.expect()
                loss.total.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss.total.detach(), loss.ce, loss.kd]).float()
        with self._clock.region("optimizer"):
            if self._gradients is not None:
                self._gradients.finish()
            # What processes exchange comes before the step: where one is lost, the weights of the others stay whole.
            self._ranks.sum(sums)
            norm = clip(self._parameters, self._clip)
            figures = torch.cat([sums, norm.reshape(1).to(sums)])
            finite = sums[0].isfinite() & figures[3].isfinite()
            self._bad.copy_(torch.maximum(self._bad, (~finite).to(self._bad)))
            if self._flagged or not bool(self._bad):
                self._optimizer.step()
        host, arrived = self._sent(figures)
        self._launched.append(_Launched(step, rate, tokens, host, arrived))
        self._clock.end_step()

    def ready(self) -> Iterator[Figures]:
        """Figures of the steps that are more than `lag` behind, oldest first; waits for those."""
        return self._read(self._lag)

    def flush(self) -> Iterator[Figures]:
        """Figures of all steps on their way, oldest first; after it the weights are those of the last one."""
        return self._read(0)

    def _read(self, leave: int) -> Iterator[Figures]:
        while len(self._launched) > leave:
            launched = self._launched.popleft()
            if launched.arrived is not None:
                launched.arrived.synchronize()
            loss, ce, kd, norm = launched.figures.tolist()
            if math.isfinite(loss) and not math.isfinite(norm):
                loss = norm
            if not math.isfinite(loss):
                self._launched.clear()  # those after it were steps in name only
            yield Figures(launched.step, launched.rate, launched.tokens, loss, ce, kd, norm)

    def _micro_batches(self, fed: Fed) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor] | None, bool]]:
        """Token ids on the device, labels in CPU memory, what is stored of the teacher on the device; the last one?"""
        with self._clock.region("data"):
            windows = torch.from_numpy(fed.windows[fed.mine])
            inputs, labels = (self._pinned(part.contiguous()) for part in (windows[:, :-1], windows[:, 1:]))
            places = [place for place in torch.arange(len(windows)).tensor_split(self._parts) if len(place)]
        for place in places:
            rows = slice(int(place[0]), int(place[-1]) + 1)
            with self._clock.region("data"):
                there = inputs[rows].to(self._device, non_blocking=True)
                stored = None
                if fed.stored is not None:
                    stored = {name: part[rows].to(self._device, non_blocking=True) for name, part in fed.stored.items()}
            yield there, labels[rows].reshape(-1), stored, place is places[-1]

    def _pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that a copy to the GPU need not wait for."""
        return tensor.pin_memory() if self._gpu else tensor

    def _sent(self, figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Sends the figures to the host: where they will be, and what happens when they are there."""
        if not self._gpu:
            return figures.cpu(), None
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return host, arrived
