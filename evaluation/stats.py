"""Shares with intervals that hold at 0 % and 100 %, and the paired test between two arms.

Wilson's score interval is for display, the exact (Clopper-Pearson) interval stands beside it in the JSON.
Sources: Wilson, JASA 22 (1927) 209-212; Clopper and Pearson, Biometrika 26 (1934) 404-413; McNemar, Psychometrika 12
(1947) 153-157, in its exact binomial form. Both come from ``scipy.stats.binomtest``.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest

CONFIDENCE = 0.95


class Rate(BaseModel):
    """A share ``count / n`` with its 95 % intervals; all shares lie in [0, 1], and ``rate`` is None when n is 0."""

    model_config = ConfigDict(frozen=True)

    count: int
    n: int
    rate: float | None
    low: float
    high: float
    exact_low: float
    exact_high: float


class PairedTest(BaseModel):
    """Two arms on the same prompts: how often only one of them has the property, and the exact two-sided p-value.

    ``difference`` is the first arm's share minus the second's, over the ``n`` prompts that both arms have scored.
    """

    model_config = ConfigDict(frozen=True)

    n: int
    only_first: int
    only_second: int
    difference: float | None
    p_value: float


def rate(count: int, n: int) -> Rate:
    """The share ``count / n`` with Wilson and exact intervals; with n = 0 nothing is known: [0, 1].

    Raises:
        ValueError: ``count`` is not in 0..n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"count must be in 0..{n}, not {count}")
    if n == 0:
        return Rate(count=0, n=0, rate=None, low=0.0, high=1.0, exact_low=0.0, exact_high=1.0)
    test = binomtest(count, n)
    wilson = test.proportion_ci(CONFIDENCE, method="wilson")
    exact = test.proportion_ci(CONFIDENCE, method="exact")
    return Rate(
        count=count,
        n=n,
        rate=count / n,
        low=float(wilson.low),
        high=float(wilson.high),
        exact_low=float(exact.low),
        exact_high=float(exact.high),
    )


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """McNemar's exact test on paired yes/no findings, in the same order of prompts.

    Only the prompts on which the arms differ carry information: under the null hypothesis each of them is a fair coin.

    Raises:
        ValueError: the sequences differ in length.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    discordant = only_first + only_second
    return PairedTest(
        n=len(pairs),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / len(pairs) if pairs else None,
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    )
