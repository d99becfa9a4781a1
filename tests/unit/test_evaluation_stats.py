"""Intervals and the paired test against published and hand-computed values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.stats import mcnemar, rate


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(0, 520, 0.0, 0.73), (26, 520, 3.43, 7.23), (5, 520, 0.41, 2.23), (0, 100, 0.0, 3.70), (520, 520, 99.27, 100.0)],
)
def test_wilson_interval_has_the_known_values(count: int, n: int, low: float, high: float) -> None:
    found = rate(count, n)
    assert 100 * found.low == pytest.approx(low, abs=0.005)
    assert 100 * found.high == pytest.approx(high, abs=0.005)


def test_wilson_interval_follows_the_formula() -> None:
    count, n, z = 24, 136, 1.959963984540054
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = rate(count, n)
    assert found.low == pytest.approx(middle - half)
    assert found.high == pytest.approx(middle + half)


def test_exact_interval_at_zero_follows_the_formula() -> None:
    # With no success, Clopper-Pearson's upper bound solves (1 - p)^n = 0.025.
    assert rate(0, 520).exact_high == pytest.approx(1 - 0.025 ** (1 / 520))


def test_nothing_measured_means_nothing_known() -> None:
    found = rate(0, 0)
    assert (found.rate, found.low, found.high) == (None, 0.0, 1.0)


@pytest.mark.parametrize(("count", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="count must be in"):
        rate(count, n)


@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_contain_the_share_and_never_collapse(counts: tuple[int, int]) -> None:
    found = rate(*counts)
    assert found.rate is not None
    tolerance = 1e-12
    assert 0 <= found.low <= found.rate + tolerance
    assert found.rate - tolerance <= found.high <= 1
    assert found.high > found.low
    assert found.exact_high > found.exact_low


def test_mcnemar_counts_only_the_pairs_that_differ() -> None:
    first = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 5
    found = mcnemar(first, second)
    assert (found.n, found.only_first, found.only_second) == (20, 8, 2)
    assert found.difference == pytest.approx(0.3)
    # Two-sided binomial: 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10.
    assert found.p_value == pytest.approx(2 * 56 / 1024)


def test_mcnemar_without_a_difference_is_certain_of_nothing() -> None:
    assert mcnemar([True, False], [True, False]).p_value == 1.0
    assert mcnemar([], []).difference is None


def test_mcnemar_refuses_unpaired_findings() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])
