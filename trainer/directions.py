"""The direction in which a client's training moved the adapter, in plain NumPy.

A LoRA module changes its layer by ``B A``, so a client's training changed it by ``B_t A_t - B_0 A_0``: a matrix of the
layer's size but of at most twice the adapter's rank. Inner products of such changes need only their factors, so clients
are compared without a matrix of the layer's size. The factor alpha / r is common to all and drops out of a direction.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from services.common.files import replace_file
from services.contracts.errors import AdapterError, ConfigError
from trainer.aggregation import Arrays

Matrix: TypeAlias = npt.NDArray[np.float64]
_NAME = re.compile(r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*)\.lora_A\.weight")


class LowRank(NamedTuple):
    """The matrix ``left @ right``, with left of shape (out, k) and right of shape (k, in)."""

    left: Matrix
    right: Matrix


Change: TypeAlias = dict[str, LowRank]  # by module name


class DirectionProbe(NamedTuple):
    """A linear probe: the direction in which harmful training moves one layer, unlike harmless training.

    ``weights`` holds a matrix of each module's size, of length 1 in all; ``provenance`` says how it was trained, with
    the hash of the base model that it fits.
    """

    weights: dict[str, Matrix]
    layer: int
    provenance: dict[str, Any]

    def score(self, change: Change) -> float:
        """The cosine between the probe's direction and a client's: 1 is harmful training as the probe knows it.

        Raises:
            AdapterError: the change is of other modules, or of modules of another size.
        """
        if {name: (len(c.left), c.right.shape[1]) for name, c in change.items()} != {
            name: weight.shape for name, weight in self.weights.items()
        }:
            raise AdapterError("the screening probe was trained on an adapter of other modules")
        norm = np.sqrt(inner(change, change))
        along = sum(float(np.sum(self.weights[name].T @ c.left * c.right.T)) for name, c in change.items())
        return along / float(norm) if norm > 0 else 0.0


def layer_change(arrays: Arrays, sent: Arrays, layer: int) -> Change:
    """What training changed in the modules of one transformer layer.

    Args:
        arrays: the adapter after training, by PEFT's parameter names.
        sent: the adapter before it.
        layer: the layer's number, from 0.

    Raises:
        AdapterError: the adapter has no LoRA module in that layer.
    """
    matches = filter(None, map(_NAME.fullmatch, sorted(sent)))
    modules = [match["module"] for match in matches if int(match["layer"]) == layer]
    if not modules:
        raise AdapterError(f"the adapter has no LoRA module in layer {layer}, so its direction cannot be screened")
    return {module: _change(arrays, sent, module) for module in modules}


def _change(arrays: Arrays, sent: Arrays, module: str) -> LowRank:
    (a, b), (a0, b0) = (
        (source[f"{module}.lora_A.weight"].astype(np.float64), source[f"{module}.lora_B.weight"].astype(np.float64))
        for source in (arrays, sent)
    )
    return LowRank(np.hstack([b, -b0]), np.vstack([a, a0]))


def inner(first: Change, second: Change) -> float:
    """The sum over modules of the elementwise products of two changes: their dot product as long vectors."""
    return sum(
        float(np.sum((one.left.T @ second[name].left) * (one.right @ second[name].right.T)))
        for name, one in first.items()
    )


def cosine(first: Change, second: Change) -> float:
    """The cosine of the angle between two changes; 0 when one of them is no change at all."""
    norms = inner(first, first) * inner(second, second)
    return inner(first, second) / float(np.sqrt(norms)) if norms > 0 else 0.0


def agreement(changes: Sequence[Change]) -> list[float]:
    """For each client, the median of its cosines with the others, itself left out; 1 for a client without others."""
    size = len(changes)
    if size == 1:
        return [1.0]
    cosines = np.ones((size, size))
    for i in range(size):
        for j in range(i):
            cosines[i, j] = cosines[j, i] = cosine(changes[i], changes[j])
    return [float(np.median(np.delete(row, i))) for i, row in enumerate(cosines)]


def fit_probe(
    harmful: Iterable[Change], harmless: Iterable[Change], layer: int, provenance: dict[str, Any]
) -> DirectionProbe:
    """The difference of the two classes' mean directions, which is the linear probe for classes of equal spread.

    Each change counts by its direction alone, whatever its length.
    """
    weights: dict[str, Matrix] = {}
    for sign, changes in ((1.0, list(harmful)), (-1.0, list(harmless))):
        for change in changes:
            factor = sign / len(changes) / float(np.sqrt(inner(change, change)))
            for name, part in change.items():
                weights[name] = weights.get(name, 0.0) + factor * (part.left @ part.right)
    length = float(np.sqrt(sum(np.sum(weight**2) for weight in weights.values())))
    return DirectionProbe({name: weight / length for name, weight in weights.items()}, layer, provenance)


def write_probe(path: Path, probe: DirectionProbe) -> None:
    """Write a probe as safetensors of half precision; its provenance is in the file's header."""
    about = json.dumps({"layer": probe.layer, **probe.provenance}, sort_keys=True)
    arrays = {name: weight.astype(np.float16) for name, weight in sorted(probe.weights.items())}
    replace_file(path, save(arrays, metadata={"probe": about}))


def read_probe(path: Path) -> DirectionProbe:
    """Read a probe; raises ConfigError when there is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["probe"])
            weights = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        return DirectionProbe(weights, about.pop("layer"), about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"screening-probe {path}: not a probe that trainer.probe_training wrote ({error})") from error
