"""The n-gram tier: linear heads over hashed n-grams (:mod:`services.safety.embedded.features`), in NumPy alone.

* ``prompt``: does the text ask for harm?
* ``content``: is it harmful in itself, by what it says or by setting out to do harm?
* ``refusal``: does it decline?
* ``categories``: one score for each hazard category that the training data allows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.contracts.errors import ConfigError
from services.safety.embedded.features import BUCKET_BITS, Features, features, normalise, windows, words
from services.safety.embedded.scores import HEADS, Floats, Window, sigmoid
from services.safety.embedded.weights import SHIPPED, WeightsFile, read_weights

MODEL_ID = "fedward-safety-ngram-1"
# Buckets of each block, as a power of two: a head with fewer folds the common buckets together.
HEAD_BITS = {"prompt": 17, "content": 16, "refusal": 14, "categories": 12}


def fold(indices: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """Indices into a head of 2 x 2**bits buckets."""
    return (indices & ((1 << bits) - 1)) + ((indices >> BUCKET_BITS) << bits)


def load_ngram(folder: Path = SHIPPED / "ngram") -> "NgramScorer":
    """The tier of a weights folder; raises ConfigError when the files are missing, malformed or tampered with."""
    file = read_weights(folder)
    try:
        return NgramScorer(file)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{folder}: the weights lack something that this version needs: {error!r}") from error


class NgramScorer:
    """The heads in memory."""

    tier = "n-gram"

    def __init__(self, file: WeightsFile) -> None:
        self.model_id = file.manifest.model_id
        self.sha256 = file.manifest.sha256
        self.categories = tuple(file.metadata["categories"].split(","))
        self._weights: dict[str, Floats] = {}
        for name, bits in HEAD_BITS.items():
            count = len(self.categories) if name == "categories" else 1
            self._weights[name] = file.tensors[name].astype(np.float32).reshape(count, 2 << bits)
        self._biases = {
            name: np.array(file.metadata[f"{name}_bias"].split(","), np.float32).reshape(-1) for name in HEAD_BITS
        }

    def windows(self, text: str) -> list[Window]:
        """The words of the text, window by window; none for a text without words."""
        found = words(normalise(text))
        return list(windows(found)) if found else []

    def run(self, windows: Sequence[Window]) -> Floats:
        """Probabilities (n, 3 + C) of windows of words."""
        rows = np.empty((len(windows), len(HEADS) + len(self.categories)), np.float32)
        for row, window in zip(rows, windows, strict=True):
            vector = features(list(window))
            row[:] = np.concatenate([self.logits(head, vector) for head in HEAD_BITS])
        return sigmoid(rows)

    def logits(self, head: str, vector: Features) -> Floats:
        """One head's logits (1,) for one window; (C,) for ``categories``."""
        weights, biases = self.head(head)
        found: Floats = weights[:, fold(vector.indices, HEAD_BITS[head])] @ vector.values + biases
        return found

    def head(self, name: str) -> tuple[Floats, Floats]:
        """A head's weights (outputs, 2 x buckets) and biases (outputs,)."""
        return self._weights[name], self._biases[name]
