"""The exponential moving average that trainers' charts are read with, computed in blocks."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np

from console.chart.grown import Column, Grown

_BLOCK = 64
_UNSEEN = math.log(1e-18)
"""Log of a share so small that 1 less it is 1."""
_LARGEST = 1e308
"""What is larger counts as this: sums of it stay finite."""


class Ema:
    """e(n) = beta e(n-1) + (1 - beta) y(n), divided by 1 - beta^n so that it starts at the first value.

    Grows with its series: only what is new is computed.

    Args:
        beta: the share of the past, above 0 and below 1.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self._values = Grown(np.float64)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> Column:
        """The average after every value so far, shape [values]."""
        return self._values.values

    def extend(self, new: Column) -> None:
        """Goes on over further values, which must be finite."""
        if not len(new):
            return
        n = len(self)
        carry = float(self.values[-1]) * (1.0 - self.beta**n) if n else 0.0
        means = _scan(new, self.beta, carry)
        # From some count on the divisor is 1; computing powers that small takes long.
        counts = np.arange(n + 1.0, 1.0 + min(n + len(new), math.ceil(_UNSEEN / math.log(self.beta))))
        means[: len(counts)] /= 1.0 - self.beta**counts
        self._values.append(means)

    def cut(self, length: int) -> None:
        """Forgets everything after the first `length` values."""
        self._values.cut(length)


def _scan(new: Column, beta: float, carry: float) -> Column:
    """The average not yet divided: within blocks by sums over 1, 2, 4 … values, between them one number carried on."""
    padded = np.zeros(-(-len(new) // _BLOCK) * _BLOCK)
    np.multiply(np.clip(new, -_LARGEST, _LARGEST), 1.0 - beta, out=padded[: len(new)])
    blocks = padded.reshape(-1, _BLOCK)
    apart = 1
    while apart < _BLOCK:
        blocks[:, apart:] += beta**apart * blocks[:, :-apart]
        apart *= 2
    decay = beta ** np.arange(1.0, _BLOCK + 1.0)
    last = float(decay[-1])
    ends = list(accumulate(blocks[:-1, -1].tolist(), lambda past, end: end + last * past, initial=carry))
    blocks += np.asarray(ends)[:, None] * decay
    return padded[: len(new)]
