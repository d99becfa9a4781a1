"""Client-level differential privacy: what one silo's data changed in an adapter drowns in noise.

    u_i <- (w_i - sent) * min(1, C / ||w_i - sent||)        C is dp-clipping-norm, over all parameters together
    central:  mean <- sent + (sum_i u_i + N(0, (z C)^2)) / n         z is dp-noise-multiplier, n clients answered
    local:    each client sends  sent + u_i + N(0, (z C)^2)

Two data sets are neighbours when one client's data is replaced by any other; who took part is no secret. The sum then
changes by 2 C at most, so that a release is a Gaussian mechanism of noise multiplier z / 2. Releases compose by Renyi
differential privacy (Mironov, arXiv 1702.07476; Opacus computes it). No amplification by sampling is claimed: clients
are drawn from a seed that every client knows, and a client that answers late is missing.

Clipping and the noise's scale are Flower's own functions. Its noise is not used: it comes from NumPy's Mersenne
Twister, which can be predicted, and ours from the operating system. docs/privacy.md says what this protects.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from flwr.supercore.differential_privacy import compute_clip_model_update, compute_stdv
from pydantic import BaseModel
from scipy.special import ndtri

from services.contracts.errors import ConfigError
from trainer.aggregation import Arrays, ClientUpdate, RunningMean, distance
from trainer.config import RunConfig
from trainer.files import append_line, make_dir

LEDGER = "releases.jsonl"
RELEASES = "noised-releases"  # the count that a client sends under local privacy
MAX_RELEASES = 10**6  # a client that claims more only makes the report useless
SENSITIVITY = 2.0  # in clipping norms: an update is replaced by the opposite one
ORDERS = 1 + np.geomspace(1e-6, 1e6, 601)  # so close that the best of them is within a thousandth of the optimum

Normal: TypeAlias = Callable[[tuple[int, ...]], npt.NDArray[np.float64]]


class PrivacySpent(BaseModel):
    """What a run has spent: (epsilon, delta) for each client's data, of all noised releases so far.

    Under ``local`` it holds for the client with the most releases, and against the coordinator too.
    """

    dp: Literal["central", "local"]
    clipping_norm: float
    noise_multiplier: float
    releases: int
    epsilon: float
    delta: float


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
        return self._mechanism.add_noise(super().mean(), self.weight)


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
    """What a client under local privacy sends of what it trained, and its releases so far, this one included."""
    releases = note_release(folder, round_number)
    mechanism = mechanism_of(config)
    return mechanism.add_noise(mechanism.clip(trained, received), 1), releases


def note_release(folder: Path, round_number: int) -> int:
    """Note a release before it is made, so that a crash after it cannot lose it; gives how many there are.

    A round that is done again releases again, and is noted again.
    """
    append_line(make_dir(folder) / LEDGER, json.dumps({"round": round_number}))
    return count_releases(folder)


def count_releases(folder: Path) -> int:
    """How many releases are noted."""
    return len((folder / LEDGER).read_bytes().splitlines())


def spend(
    config: RunConfig, run_dir: Path, round_number: int, accepted: Sequence[ClientUpdate], before: PrivacySpent | None
) -> PrivacySpent | None:
    """Book a round, before its aggregate is made; None in a run without privacy.

    Args:
        config: the run's settings.
        run_dir: where the coordinator's ledger is.
        round_number: the round.
        accepted: its updates, which under local privacy tell how much their clients have released.
        before: what was spent after the round before.

    Raises:
        ConfigError: the ledger lacks releases of earlier rounds.
    """
    if config.dp == "off":
        return None
    if config.dp == "central":
        releases = note_release(run_dir, round_number)
        if releases < round_number:
            raise ConfigError(
                f"{run_dir / LEDGER} holds {releases} releases after {round_number} rounds: without the others epsilon "
                "is unknown; restore the file, or choose another run-dir"
            )
    else:
        claimed = max(int(min(update.metrics[RELEASES], MAX_RELEASES)) for update in accepted)
        releases = max(claimed, before.releases if before else 1)
    return PrivacySpent(
        dp=config.dp,
        clipping_norm=config.dp_clipping_norm,
        noise_multiplier=config.dp_noise_multiplier,
        releases=releases,
        epsilon=epsilon_of(releases, config.dp_noise_multiplier, config.dp_delta),
        delta=config.dp_delta,
    )


def epsilon_of(releases: int, noise_multiplier: float, delta: float) -> float:
    """The epsilon of so many releases, by Opacus' bound for Renyi differential privacy without sampling."""
    from opacus.accountants.analysis import rdp  # takes seconds to load, which clients need not wait for

    spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise_multiplier / SENSITIVITY, steps=releases, orders=ORDERS)
    epsilon, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=spent, delta=delta)
    return float(epsilon)
