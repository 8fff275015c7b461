"""pass@k: how likely one of k answers is right, estimated without bias from n of them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k) of one problem.

    Computed as the product 1 - Π (1 - k / i) for i from n - c + 1 to n: binomial coefficients of a thousand answers are
    no floats any more. Where fewer than k are wrong, one of the factors is exactly 0.

    Args:
        n: answers that were judged.
        c: those that are right, 0 to n.
        k: answers that one may give, 1 to n.

    Returns:
        A share, 0 to 1; exactly 0 where none is right, exactly 1 where fewer than k are wrong.

    Raises:
        ValueError: c or k is out of range.

    Source: Chen et al. (2021), arXiv:2107.03374, section 2.1, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n}: expected 0 <= c <= n and 1 <= k <= n")
    if k == 1:
        return c / n
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_pass_at_k(solved: Sequence[tuple[int, int]], k: int) -> float | None:
    """The mean of `pass_at_k` over problems.

    Args:
        solved: (n, c) of each problem.
        k: answers that one may give.

    Returns:
        None where there is no problem, or one with fewer than k answers.
    """
    if not solved or any(n < k for n, _ in solved):
        return None
    return math.fsum(pass_at_k(n, c, k) for n, c in solved) / len(solved)
