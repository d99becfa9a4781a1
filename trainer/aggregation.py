"""What the coordinator does with the updates that arrive: check each one, average them as they come, count bytes.

Plain NumPy on ``{parameter name: array}``; Flower's messages are unpacked by ``server_app``, and what is done with the
average is the strategy's (``trainer.strategies``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from services.contracts.errors import AdapterError, FedwardError

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
MAX_WEIGHT = 2**29 - 1  # 24 significant bits of a float32 and these 29 fit the 53 of a float64: no product is rounded


class TooFewClients(FedwardError):
    """Fewer updates than ``min-clients`` were accepted, so the round cannot be aggregated."""

    code = "too_few_clients"
    exit_code = 8


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sent back: its adapter, the aggregate counts that go with it, and what it curated with.

    ``filter_model`` is the classifier's id and sha256, or None when the client did not curate.
    """

    client_id: int
    arrays: Arrays
    metrics: Mapping[str, float]
    filter_model: tuple[str, str] | None = None

    @property
    def num_tokens(self) -> int:
        """How many answer tokens the client trained on: its weight in the average; 1 when it does not tell."""
        return int(self.metrics.get("num-tokens", 1))

    def counts_only(self) -> Self:
        """This update without its arrays, which are not kept once they are part of the aggregate."""
        return replace(self, arrays={})


class RunningMean:
    """The weighted mean of arrays that are added one at a time, and may be dropped after that.

    Memory is that of four float64 numbers per parameter, however many are added. The sum is kept in twice float64's
    precision (Knuth's TwoSum, The Art of Computer Programming 4.2.2) and rounded to float32 once at the end, so that
    the order of arrival does not show: it could only where values cancel each other by some 70 binary digits.
    """

    def __init__(self) -> None:
        self._high: Arrays = {}
        self._low: Arrays = {}
        self.weight = 0

    def add(self, arrays: Arrays, weight: int) -> None:
        """Add arrays of float32, of the same names and shapes each time, with a weight from 1 to ``MAX_WEIGHT``."""
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueError(f"a weight of {weight} is not from 1 to {MAX_WEIGHT}")
        for name, array in arrays.items():
            term = array.astype(np.float64) * weight
            high = self._high.get(name, np.zeros_like(term))
            total = high + term
            back = total - high
            lost = (high - (total - back)) + (term - back)  # total + lost is exactly high + term
            self._high[name] = total
            self._low[name] = self._low.get(name, 0.0) + lost
        self.weight += weight

    def mean(self) -> Arrays:
        """The mean as float32; raises ValueError when nothing was added."""
        return {name: array.astype(np.float32) for name, array in self.unrounded_mean().items()}

    def unrounded_mean(self) -> Arrays:
        """The mean as float64; raises ValueError when nothing was added."""
        if not self.weight:
            raise ValueError("there is no mean of nothing")
        return {name: (high + self._low[name]) / self.weight for name, high in self._high.items()}


def check_update(
    update: ClientUpdate, reference: Arrays, expected_metrics: Sequence[str], max_tokens: int, max_norm: float = 0.0
) -> None:
    """Refuse an update that must not be averaged.

    Args:
        update: what the client sent.
        reference: what the client was given of it; names, shapes and dtypes have to be the same.
        expected_metrics: the counts that the client has to send, no more and no fewer.
        max_tokens: no client can honestly have trained on more answer tokens; it bounds a client's weight.
        max_norm: the largest Euclidean norm of what the client changed; 0 is no bound.

    Raises:
        AdapterError: naming the client, the parameter and what is wrong with it.
    """
    where = f"client {update.client_id}"
    if set(update.metrics) != set(expected_metrics):
        wrong = sorted(set(update.metrics) ^ set(expected_metrics))
        raise AdapterError(f"{where}: unexpected or missing counts: {', '.join(wrong)}")
    for key, value in update.metrics.items():
        if not (math.isfinite(value) and value >= 0):
            raise AdapterError(f"{where}: {key} is {value:g}, which is not a number from 0 up")
    tokens = update.metrics.get("num-tokens", 1)
    if tokens != int(tokens) or not 1 <= tokens <= max_tokens:
        raise AdapterError(f"{where}: num-tokens is {tokens:g}, which is not a whole number from 1 to {max_tokens}")
    check_arrays(where, update.arrays, reference)
    if max_norm and (norm := distance(update.arrays, reference)) > max_norm:
        raise AdapterError(f"{where}: the update's norm is {norm:.4g}, and max-update-norm is {max_norm:g}")


def distance(arrays: Arrays, reference: Arrays) -> float:
    """The Euclidean norm of the difference over all parameters."""
    squares = (np.square(array.astype(np.float64) - reference[name]).sum() for name, array in arrays.items())
    return math.sqrt(sum(squares))


def check_arrays(where: str, arrays: Arrays, reference: Arrays) -> None:
    """Compare names, shapes and dtypes with ``reference`` and look for NaN and infinity; raises AdapterError."""
    if unmatched := sorted(set(reference) ^ set(arrays)):
        problem = "missing" if unmatched[0] in reference else "unknown"
        raise AdapterError(f"{where}: parameter {unmatched[0]} is {problem} (of {len(unmatched)} that do not match)")
    for name, wanted in reference.items():
        found = arrays[name]
        if found.shape != wanted.shape:
            raise AdapterError(f"{where}: parameter {name} has shape {found.shape}, not {wanted.shape}")
        if found.dtype != wanted.dtype:
            raise AdapterError(f"{where}: parameter {name} has dtype {found.dtype}, not {wanted.dtype}")
        if not np.isfinite(found).all():
            raise AdapterError(f"{where}: parameter {name} holds NaN or infinity")


def require_enough(accepted: Sequence[ClientUpdate], rejected: Mapping[int, str], min_clients: int) -> None:
    """Raise TooFewClients, with each client's reason, when fewer than ``min_clients`` updates are left."""
    if len(accepted) < min_clients:
        reasons = "; ".join(reason for _, reason in sorted(rejected.items()))
        raise TooFewClients(f"{len(accepted)} of at least {min_clients} updates are usable ({reasons})")


def mean_by_tokens(updates: Sequence[ClientUpdate], metric: str) -> float:
    """The mean of a metric over clients, weighted by answer tokens as the adapters are."""
    total = sum(update.num_tokens for update in updates)
    return sum(update.metrics[metric] * update.num_tokens for update in updates) / total


def count_bytes(arrays: Arrays) -> int:
    """The bytes of the adapter's numbers, which is what a message carries but for its envelope."""
    return sum(array.nbytes for array in arrays.values())
