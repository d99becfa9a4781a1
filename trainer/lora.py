"""LoRA adapters as pairs of factors: W + (alpha / r) B A, with A of shape (r, in) and B of shape (out, r).

Everything here is about the product B A. The factor alpha / r is the same before and after aggregation as long as the
rank is, so it falls out of every formula; it is put right where the rank changes, in ``cut`` and ``pad``.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from services.contracts.errors import ConfigError
from trainer.aggregation import Arrays

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


class Factors(NamedTuple):
    """One layer's pair; the update of its weight is ``b @ a`` (times alpha / r)."""

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]


class Truncated(NamedTuple):
    """The best approximation of a product, and the squared Frobenius norm of what it lost."""

    factors: Factors
    lost: float


def to_layers(arrays: Arrays) -> dict[str, Factors]:
    """An adapter's pairs by layer; raises ConfigError when it holds anything but pairs."""
    layers = [name.removesuffix(A_SUFFIX) for name in arrays if name.endswith(A_SUFFIX)]
    if {layer + suffix for layer in layers for suffix in (A_SUFFIX, B_SUFFIX)} != set(arrays):
        raise ConfigError("this strategy takes adapters of LoRA's A and B matrices only")
    return {layer: Factors(arrays[layer + A_SUFFIX], arrays[layer + B_SUFFIX]) for layer in layers}


def from_layers(layers: dict[str, Factors]) -> Arrays:
    """The adapter as arrays of float32, sorted by name."""
    arrays = {layer + A_SUFFIX: pair.a for layer, pair in layers.items()}
    arrays |= {layer + B_SUFFIX: pair.b for layer, pair in layers.items()}
    return {name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)}


def b_only(arrays: Arrays) -> Arrays:
    """The B matrices of an adapter."""
    return {name: array for name, array in arrays.items() if name.endswith(B_SUFFIX)}


def head(arrays: Arrays, rank: int) -> Arrays:
    """The first ``rank`` components of an adapter, with values as they are."""
    return {name: array[:rank] if name.endswith(A_SUFFIX) else array[:, :rank] for name, array in arrays.items()}


def cut(arrays: Arrays, rank: int, of: int) -> Arrays:
    """The first ``rank`` of ``of`` components as an adapter of that lower rank.

    B shrinks by rank / of, because alpha / rank is larger than alpha / of by as much.
    """
    return {
        name: array * np.float32(rank / of) if name.endswith(B_SUFFIX) else array
        for name, array in head(arrays, rank).items()
    }


def pad(arrays: Arrays, rank: int, to: int) -> Arrays:
    """An adapter of ``rank`` as one of rank ``to`` that means the same: zeros are added, and B grows by to / rank."""
    if rank == to:
        return arrays
    more = to - rank
    return {
        name: np.pad(array, ((0, more), (0, 0)))
        if name.endswith(A_SUFFIX)
        else np.pad(array * np.float32(to / rank), ((0, 0), (0, more)))
        for name, array in arrays.items()
    }


def claimed_rank(arrays: Arrays, reference: Arrays) -> int:
    """The rank that an unchecked adapter's first A matrix suggests, if it is from 1 to the reference's; else that."""
    name = next(name for name in reference if name.endswith(A_SUFFIX))
    full: int = reference[name].shape[0]
    found = arrays.get(name)
    return found.shape[0] if found is not None and found.ndim == 2 and 1 <= found.shape[0] <= full else full


def stack(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors whose product is exactly the weighted sum of the pairs' products; the rank is the sum of ranks."""
    return Factors(
        np.concatenate([pair.a.astype(np.float64) for pair in pairs]),
        np.concatenate([pair.b * np.float64(weight) for pair, weight in zip(pairs, weights, strict=True)], axis=1),
    )


def truncate(pair: Factors, rank: int) -> Truncated:
    """The closest product of the given rank: B = U S and A = V^T of the singular value decomposition, largest first.

    The rows of A are orthonormal, also where a singular value is 0, so that such a component can still be trained.
    The product itself, of shape (out, in), is never formed. Missing components are filled up with zeros.
    """
    qb, rb = np.linalg.qr(pair.b.astype(np.float64))
    qa, ra = np.linalg.qr(pair.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = min(rank, len(s))
    a, b = vt[:kept] @ qa.T, qb @ (u[:, :kept] * s[:kept])
    factors = Factors(np.pad(a, ((0, rank - kept), (0, 0))), np.pad(b, ((0, 0), (0, rank - kept))))
    return Truncated(factors, float(np.square(s[kept:]).sum()))


def relative_error(results: Iterable[Truncated], exact: Iterable[Factors]) -> float:
    """The Frobenius norm of what all layers lost, as a share of that of the exact products; 0 if these are 0."""
    lost = sum(result.lost for result in results)
    whole = sum(float(((pair.b.T @ pair.b) * (pair.a @ pair.a.T)).sum()) for pair in exact)  # trace(B^T B A A^T)
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0
