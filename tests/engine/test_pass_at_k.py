"""The unbiased estimator against exact fractions, and against what it estimates."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pass_at_k import mean_pass_at_k, pass_at_k

counts = st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


@given(counts)
def test_it_is_the_exact_fraction_to_rounding(given: tuple[int, int, int]) -> None:
    n, c, k = given
    assert pass_at_k(n, c, k) == pytest.approx(float(exact(n, c, k)), rel=1e-9, abs=1e-15)
    assert 0 <= pass_at_k(n, c, k) <= 1


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_it_is_the_share_of_all_choices_that_hold_a_right_answer(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([place < c for place in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), rel=1e-12)


@given(counts)
def test_nothing_right_is_exactly_nothing_and_too_few_wrong_exactly_everything(given: tuple[int, int, int]) -> None:
    n, c, k = given
    assert pass_at_k(n, 0, k) == 0
    assert pass_at_k(n, n, k) == 1
    assert pass_at_k(n, c, 1) == c / n
    if n - c < k:
        assert pass_at_k(n, c, k) == 1


def test_the_paper_s_naive_estimate_is_another_number() -> None:
    """1 - (1 - c/n)^k underestimates, which is why it is not taken."""
    assert pass_at_k(10, 3, 5) == pytest.approx(float(Fraction(11, 12)))
    assert pass_at_k(10, 3, 5) > 1 - (1 - 3 / 10) ** 5 + 0.05


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_counts_that_cannot_be_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)


def test_the_mean_is_over_problems_and_only_where_each_has_k_answers() -> None:
    assert mean_pass_at_k([(1, 1), (1, 0), (1, 0), (1, 1)], 1) == 0.5
    assert mean_pass_at_k([(10, 10), (10, 0)], 10) == 0.5
    assert mean_pass_at_k([(10, 1), (9, 0)], 10) is None
    assert mean_pass_at_k([], 1) is None
