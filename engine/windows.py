"""Windows over token arrays, the order in which training visits them, and what makes a batch of them useless."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from engine.checkpoint import OrderState

Tokens = npt.NDArray[np.generic]
Batch = npt.NDArray[np.int64]


class Windows:
    """Windows over one or more token arrays; none crosses from one array into the next.

    Args:
        arrays: token arrays, memory-mapped or not.
        sequence: inputs a window; a window holds one token more.
    """

    def __init__(self, arrays: Sequence[Tokens], sequence: int) -> None:
        self.arrays, self.sequence = arrays, sequence
        self._ends = list(accumulate(max(0, (len(a) - 1) // sequence) for a in arrays))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Batch:
        """Window `index`, from 0 on, as int64, shape [sequence + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        start = (index - (self._ends[which - 1] if which else 0)) * self.sequence
        return np.asarray(self.arrays[which][start : start + self.sequence + 1], dtype=np.int64)

    def stack(self, indices: Sequence[int]) -> Batch:
        """These windows as one array, shape [len(indices), sequence + 1]."""
        return np.stack([self[int(i)] for i in indices])


class Order:
    """The order of training windows, a pure function of (seed, epoch, position): those three integers are its state."""

    def __init__(self, windows: Windows, seed: int, epoch: int = 0, position: int = 0) -> None:
        if not len(windows):
            raise ValueError("no windows to put in order")
        self.windows, self.seed, self.epoch, self.position = windows, seed, epoch, position
        self._permutation = self._permute()

    @classmethod
    def at(cls, windows: Windows, state: OrderState) -> Order:
        """The order that goes on from a state."""
        return cls(windows, state.seed, state.epoch, state.position)

    @property
    def state(self) -> OrderState:
        """Where it stands: what a checkpoint keeps of it."""
        return OrderState(seed=self.seed, epoch=self.epoch, position=self.position)

    def next(self, count: int) -> Batch:
        """The next `count` windows, shape [count, sequence + 1]; each epoch visits every window once."""
        return self.windows.stack(self.take(count))

    def take(self, count: int) -> tuple[int, ...]:
        """The indices of the next `count` windows."""
        chosen: list[int] = []
        while len(chosen) < count:
            if self.position >= len(self._permutation):
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._permute()
            take = self._permutation[self.position : self.position + count - len(chosen)]
            chosen.extend(int(i) for i in take)
            self.position += len(take)
        return tuple(chosen)

    def _permute(self) -> npt.NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch])))
        return generator.permutation(len(self.windows))


def degenerate(batch: Batch, ignored: npt.NDArray[np.bool_] | None = None) -> str | None:
    """Names what makes a batch useless for learning, or None.

    Args:
        batch: windows, shape [windows, sequence + 1].
        ignored: labels that do not count, shape [windows, sequence].
    """
    inputs, labels = batch[:, :-1], batch[:, 1:]
    if labels.size == 0 or (ignored is not None and bool(ignored.all())):
        return "empty labels: no position counts"
    if bool((batch == batch[0, 0]).all()):
        return f"one token repeated: every token is {int(batch[0, 0])}"
    if len(batch) > 1 and bool((inputs == inputs[0]).all()) and not bool((labels == labels[0]).all()):
        return f"the same inputs with different labels: {len(batch)} windows differ in their labels alone"
    return None
