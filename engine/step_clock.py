"""Where the time of training steps goes, by named regions, and how fast the device multiplies at best."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

REGIONS = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""What a step consists of; the rest of its time has no name here."""
_PEAK_SECONDS = 0.2


class _Mark(Protocol):
    """A moment on the device."""

    def seconds_until(self, later: _Mark) -> float:
        """Seconds from this moment to a later one; both have passed."""

    def passed(self) -> bool:
        """Whether the device has come to it; never waits."""


class _WallMark:
    """A moment by the wall clock: on the CPU work is done when its call returns."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _WallMark)
        return later._at - self._at

    def passed(self) -> bool:
        return True


class _CudaMark:
    """A moment in the work of a GPU's current stream: the host goes on without waiting for it."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _CudaMark)
        return float(self._event.elapsed_time(later._event)) / 1e3

    def passed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class StepClock:
    """Where the time of steps goes. On CUDA by events, read late, so that nothing waits; elsewhere by the wall clock.

    A GPU's figures are those of its own work: what the host does meanwhile does not count, and a region in which the
    GPU waits for the host (for a batch, say) counts as long as it waits.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark: type[_WallMark | _CudaMark] = _CudaMark if device.type == "cuda" else _WallMark
        self._open: list[tuple[str, _Mark, _Mark]] = []
        self._ended: deque[list[tuple[str, _Mark, _Mark]]] = deque()
        self._inside = ""

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`; a region inside of another would count twice and is refused.

        Raises:
            ValueError: an unknown name, or a region inside of another.
        """
        if name not in REGIONS or self._inside:
            raise ValueError(f"region {name}{f' inside of {self._inside}' if self._inside else ''}")
        self._inside, begun = name, self._mark()
        try:
            yield
        finally:
            self._inside = ""
            self._open.append((name, begun, self._mark()))

    def end_step(self) -> None:
        """What was counted since the last call is one step."""
        self._ended.append(self._open)
        self._open = []

    def take(self) -> tuple[int, dict[str, float]]:
        """Whole steps since the last call, and the seconds in all of them by region; never waits for the device.

        A step that the device has not finished is left for the next call.
        """
        steps, seconds = 0, dict.fromkeys(REGIONS, 0.0)
        while self._ended and all(end.passed() for _, _, end in self._ended[0][-1:]):
            for name, begun, end in self._ended.popleft():
                seconds[name] += begun.seconds_until(end)
            steps += 1
        return steps, seconds


class _NoClock(StepClock):
    """Counts nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        yield

    def end_step(self) -> None:
        pass


NO_CLOCK: StepClock = _NoClock()
"""Stands where nobody asks for times: in evaluations and tests."""


def product_side(device: torch.device) -> int:
    """Rows and columns of the matrices that `measure_peak` multiplies."""
    return 1024 if device.type == "cpu" else 4096


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few in 0.2 s: what stands for a peak where none is published.

    Draws no random number, so that training goes on as it would without.

    Args:
        device: that trains.
        dtype: of the products.
    """
    side = product_side(device)
    matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    begun, best = time.perf_counter(), 0.0
    while not best or time.perf_counter() - begun < _PEAK_SECONDS:
        at = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - at))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
