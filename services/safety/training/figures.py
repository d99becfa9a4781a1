"""Figures of a classifier on labelled scores: thresholds, shares with intervals, average precision, calibration error.

Everywhere here ``scores`` (n,) are P(unsafe) in [0, 1], with ``UNSCORED`` where the classifier gave none, and
``unsafe`` (n,) are the labels. What is unscored is never safe: it counts as flagged at every threshold.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from services.contracts.verdicts import Accuracy
from services.safety.calibration import Ranking

UNSCORED = np.inf
RESAMPLES = 1000
BINS = 15
CHUNK = 100  # resamples at a time; bounds memory to some ten megabytes for 10,000 rows
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Scored(NamedTuple):
    """Scores (n,), ``UNSCORED`` where there is none, with their labels (n,)."""

    scores: Floats
    unsafe: Bools


def lowest_threshold(scores: Floats, unsafe: Bools, false_positives: float) -> float:
    """The lowest threshold at which no more than a share of the safe items is flagged.

    All thresholds between two neighbouring scores flag the same items; the middle is taken, where rounding matters
    least. Where no threshold keeps the bound (the classifier gives 1.0 to more safe items than that, or does not score
    them), it is the lowest one at which as few safe items as possible are flagged.
    """
    safe = np.sort(scores[~unsafe])[::-1]
    allowed = int(false_positives * len(safe) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if allowed >= len(safe):
        return 0.0
    # A threshold of 1.0 is the highest there is, so scores of 1.0 and unscored items are over every one.
    below = min(float(safe[allowed]), float(safe[safe < 1.0].max(initial=0.0)))
    above = float(min(1.0, scores[scores > below].min(initial=1.0)))
    middle = (below + above) / 2
    return middle if middle > below else above


def accuracy(flagged: Bools, unsafe: Bools) -> Accuracy:
    """How well flags agree with labels (n,); intervals are Wilson's (JASA 22, 1927, 209-212), at 95 %."""
    hits, false_alarms = int((flagged & unsafe).sum()), int((flagged & ~unsafe).sum())
    unsafe_count, safe_count = int(unsafe.sum()), int((~unsafe).sum())
    recall = hits / unsafe_count if unsafe_count else None
    false_positives = false_alarms / safe_count if safe_count else None
    found = Accuracy(
        unsafe=unsafe_count,
        safe=safe_count,
        recall=recall,
        recall_interval=_wilson(hits, unsafe_count),
        false_positives=false_positives,
        false_positives_interval=_wilson(false_alarms, safe_count),
    )
    if recall is None or false_positives is None:
        return found
    both = recall + 1.0 - false_positives
    return found.model_copy(
        update={
            "precision": hits / (hits + false_alarms) if hits + false_alarms else None,
            "f1": 2 * hits / (hits + false_alarms + unsafe_count),
            "h_mean": 2 * recall * (1.0 - false_positives) / both if both else 0.0,
        }
    )


def ranking(scores: Floats, unsafe: Bools, seed: int = 0) -> Ranking:
    """Average precision with its bootstrap interval, and the calibration error of what was scored.

    Args:
        scores: with both labels among them.
        unsafe: the labels.
        seed: of the bootstrap.
    """
    ranks = np.minimum(scores, 2.0)  # unscored stands above every score; sklearn takes no infinity
    low, high = np.quantile(list(resampled_precisions(ranks, unsafe, seed)), (0.025, 0.975))
    scored = np.isfinite(scores)
    return Ranking(
        auprc=float(average_precision_score(unsafe, ranks)),
        auprc_interval=(float(low), float(high)),
        ece=calibration_error(scores[scored], unsafe[scored]),
    )


def calibration_error(scores: Floats, unsafe: Bools) -> float:
    """Expected calibration error: the mean over items of |share unsafe - mean score| in the item's bin.

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599, equation 3, M = 15 bins of equal width, each with its upper
    edge), for the probability of one class as in Naeini et al. 2015. It is 0.0 for no items.
    """
    gaps = np.bincount(bins_of(scores), unsafe - scores, BINS)
    return float(np.abs(gaps).sum() / max(len(scores), 1))


def bins_of(scores: Floats) -> npt.NDArray[np.int64]:
    """In which of ``BINS`` bins of equal width, each with its upper edge, every score lies."""
    return np.clip(np.ceil(scores * BINS).astype(np.int64) - 1, 0, BINS - 1)


def resampled_precisions(scores: Floats, unsafe: Bools, seed: int) -> Iterator[float]:
    """Average precision of ``RESAMPLES`` bootstrap samples (Efron 1979), in chunks.

    The classes are drawn apart, since their sizes are the operator's choice and not chance. A resample is a count for
    each item, so the items are sorted once: AP = sum over the different scores of (recall gained) x (precision there),
    as in :func:`sklearn.metrics.average_precision_score`.
    """
    generator = np.random.default_rng(seed)
    order = np.argsort(-scores, kind="stable")
    scores, unsafe = scores[order], unsafe[order]
    last_of_ties = np.append(np.diff(scores) != 0, True)
    for _ in range(RESAMPLES // CHUNK):
        counts = np.zeros((CHUNK, len(scores)), np.int32)
        for members in (np.flatnonzero(unsafe), np.flatnonzero(~unsafe)):
            drawn = members[generator.integers(len(members), size=(CHUNK, len(members)))]
            np.add.at(counts, (np.arange(CHUNK)[:, None], drawn), 1)
        hits = np.cumsum(counts * unsafe, axis=1)[:, last_of_ties]
        flagged = np.cumsum(counts, axis=1)[:, last_of_ties]
        gained = np.diff(hits, axis=1, prepend=0) / hits[:, -1:]
        yield from (gained * hits / np.maximum(flagged, 1)).sum(axis=1)


def _wilson(hits: int, total: int) -> tuple[float, float] | None:
    if not total:
        return None
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
