"""Client-level differential privacy: what one silo's data changed in an adapter drowns in noise.

    u_i <- (w_i - sent) * min(1, C / ||w_i - sent||)        C is dp-clipping-norm, over all parameters together
    central:  mean <- sent + (sum_i u_i + N(0, (z C)^2)) / n         z is dp-noise-multiplier, n clients answered
    local:    each client sends  sent + u_i + N(0, (z C)^2)

What that costs is booked by ``trainer.privacy_budget``; docs/privacy.md says what it protects. Clipping and the noise's
scale are Flower's own functions. Its noise is not used: it comes from NumPy's Mersenne Twister, which can be predicted,
and ours from the operating system.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from flwr.supercore.differential_privacy import compute_clip_model_update, compute_stdv
from scipy.special import ndtri

from trainer.aggregation import Arrays, RunningMean, distance
from trainer.config import RunConfig
from trainer.privacy_budget import note_release

Normal: TypeAlias = Callable[[tuple[int, ...]], npt.NDArray[np.float64]]


class Mechanism(NamedTuple):
    """Clipping and noise. ``normal`` draws standard normal numbers; tests give one with a seed."""

    clipping_norm: float
    noise_multiplier: float
    normal: Normal

    def clip(self, arrays: Arrays, reference: Arrays) -> Arrays:
        """Arrays whose difference from ``reference`` is no longer than the clipping norm, in float64."""
        if distance(arrays, reference) <= self.clipping_norm:  # Flower's function divides by it, also by zero
            return arrays
        clipped = [array.astype(np.float64) for array in arrays.values()]
        compute_clip_model_update(clipped, [reference[name].astype(np.float64) for name in arrays], self.clipping_norm)
        return dict(zip(arrays, clipped, strict=True))

    def add_noise(self, arrays: Arrays, clients: int) -> Arrays:
        """The mean of so many clipped updates with noise, as float32."""
        deviation = compute_stdv(self.noise_multiplier, self.clipping_norm, clients)
        return {
            name: (array + deviation * self.normal(array.shape)).astype(np.float32) for name, array in arrays.items()
        }


class UniformMean(RunningMean):
    """Every client counts the same: a weight by answer tokens would tell of the data, and bound nothing."""

    def add(self, arrays: Arrays, weight: int) -> None:
        """Add arrays; their weight does not count."""
        super().add(arrays, 1)


class NoisedMean(UniformMean):
    """The mean of clipped updates, with noise. Its ``mean`` is a release: to be noted first, and taken once."""

    def __init__(self, mechanism: Mechanism, sent: Arrays) -> None:
        super().__init__()
        self._mechanism, self._sent = mechanism, sent

    def add(self, arrays: Arrays, weight: int) -> None:
        """Clip the arrays against what was sent, and add them."""
        super().add(self._mechanism.clip(arrays, self._sent), weight)

    def mean(self) -> Arrays:
        """The mean with fresh noise."""
        return self._mechanism.add_noise(self.unrounded_mean(), self.weight)


def secure_normal(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Standard normal numbers from the operating system's generator, by the inverse of the distribution."""
    bits = np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64) >> 12
    uniform = (bits + 0.5) * 2.0**-52  # exact, and neither 0 nor 1
    return np.asarray(ndtri(uniform)).reshape(shape)


def mechanism_of(config: RunConfig) -> Mechanism:
    """The run's clipping and noise."""
    return Mechanism(config.dp_clipping_norm, config.dp_noise_multiplier, secure_normal)


def release_update(
    trained: Arrays, received: Arrays, config: RunConfig, folder: Path, round_number: int
) -> tuple[Arrays, int]:
    """What a client under local privacy sends of what it trained, and its releases so far, this one included.

    Raises:
        ConfigError: it would spend more than ``dp-max-epsilon``.
    """
    releases = note_release(folder, config, round_number)
    mechanism = mechanism_of(config)
    return mechanism.add_noise(mechanism.clip(trained, received), 1), releases
