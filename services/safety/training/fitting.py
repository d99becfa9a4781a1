"""The numerical part of training: hashed matrices, logistic regression, thresholds, packing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from services.safety.embedded.features import Features, features, normalise, windows, words
from services.safety.embedded.ngram import HEAD_BITS, fold
from services.safety.training.rows import Row

Floats = npt.NDArray[np.float64]

INVERSE_REGULARISATION = 32.0  # chosen on validation among 4, 16, 32 and 64
WINDOWS_PER_ROW = 4
SEED = 0


@dataclass(frozen=True)
class Head:
    """One linear head: ``weights`` (2 x buckets,) in half precision, and its bias."""

    weights: npt.NDArray[np.float16]
    bias: float


class WindowTable:
    """The windows of some rows, hashed once, for fitting several heads.

    A long safe row gives its first four windows, a long unsafe row only its first: the others need not be unsafe.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.vectors: list[Features] = []
        owners, shares = [], []
        for number, row in enumerate(rows):
            found = list(windows(words(normalise(row.text))))[: 1 if row.unsafe else WINDOWS_PER_ROW]
            self.vectors += [features(window) for window in found]
            owners += [number] * len(found)
            shares += [row.weight / np.sqrt(len(found))] * len(found)
        self._owners = np.array(owners)
        self._shares = np.array(shares)

    def fit(self, head: str, labels: Sequence[bool]) -> Head:
        """Logistic regression of the rows' labels, both classes with the same total weight."""
        wanted = np.array(labels)[self._owners]
        model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", max_iter=300, random_state=SEED)
        model.fit(matrix(self.vectors, HEAD_BITS[head]), wanted, sample_weight=_balanced(self._shares, wanted))
        return Head(model.coef_[0].astype(np.float16), float(model.intercept_[0]))


def matrix(vectors: Sequence[Features], bits: int) -> sp.csr_matrix:
    """The vectors as rows of a sparse matrix (n, 2 x 2**bits)."""
    lengths = np.cumsum([0, *(len(vector.indices) for vector in vectors)])
    values = np.concatenate([vector.values for vector in vectors])
    indices = np.concatenate([fold(vector.indices, bits) for vector in vectors])
    stacked = sp.csr_matrix((values, indices, lengths), shape=(len(vectors), 2 << bits))
    stacked.sum_duplicates()
    return stacked


def _balanced(weights: Floats, unsafe: npt.NDArray[np.bool_]) -> Floats:
    shares = np.where(unsafe, weights[unsafe].sum(), weights[~unsafe].sum())
    scaled: Floats = weights * weights.sum() / (2.0 * shares)
    return scaled


def threshold_at(scores: Sequence[float], false_positives: float) -> float:
    """The threshold that this share of (harmless) scores reaches."""
    return float(np.quantile(np.array(scores), 1.0 - false_positives))


def share_at_least(scores: Sequence[float], threshold: float) -> float:
    """The share of scores that reach the threshold."""
    return float((np.array(scores) >= threshold).mean())
