"""What the coordinator does with the updates that arrive: check each one, weigh them, count bytes.

Plain NumPy on ``{parameter name: array}``; Flower's messages are unpacked by ``server_app``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from services.contracts.errors import AdapterError, FedwardError

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


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
        """How many answer tokens the client trained on: its weight in the average."""
        return int(self.metrics["num-tokens"])


def check_update(update: ClientUpdate, reference: Arrays, expected_metrics: Sequence[str], max_tokens: int) -> None:
    """Refuse an update that must not be averaged.

    Args:
        update: what the client sent.
        reference: the adapter the client was given; names, shapes and dtypes have to be the same.
        expected_metrics: the counts that the client has to send, no more and no fewer.
        max_tokens: no client can honestly have trained on more answer tokens; it bounds a client's weight.

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
    tokens = update.metrics["num-tokens"]
    if tokens != int(tokens) or not 1 <= tokens <= max_tokens:
        raise AdapterError(f"{where}: num-tokens is {tokens:g}, which is not a whole number from 1 to {max_tokens}")
    check_arrays(where, update.arrays, reference)


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
