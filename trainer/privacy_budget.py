"""The ledger of differential privacy: what was released so far, and the epsilon that it has cost each client.

Two data sets are neighbours when one client's data is replaced by any other; who took part is no secret. A sum of
changes clipped to C then differs by 2 C at most, so that k releases with noise of z C are together one Gaussian
mechanism with mu = 2 sqrt(k) / z (Dong et al., arXiv 1905.02383, corollary 3.3), whose epsilon is known exactly. No
amplification by sampling is claimed: clients are drawn from a seed that every client knows, and a client that answers
late is missing.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr

from services.contracts.errors import ConfigError
from trainer.aggregation import ClientUpdate
from trainer.config import RunConfig
from trainer.files import make_dir, write_atomically

LEDGER = "releases.jsonl"
RELEASES = "noised-releases"  # the count that a client sends under local privacy, and the only one
MAX_RELEASES = 10**12  # a client that claims more only makes the report useless
SENSITIVITY = 2.0  # in clipping norms: an update is replaced by the opposite one


class Release(BaseModel):
    """A line of the ledger: the round that something was released in, and with how much noise."""

    round_number: int
    noise_multiplier: float = Field(gt=0)


class PrivacySpent(BaseModel):
    """What a run has spent: (epsilon, delta) for each client's data, of all noised releases so far.

    Under ``local`` it holds for the client with the most releases of those whose updates counted, and against the
    coordinator too.
    """

    dp: Literal["central", "local"]
    clipping_norm: float
    noise_multiplier: float
    releases: int
    epsilon: float
    delta: float


def note_release(folder: Path, config: RunConfig, round_number: int, at_least: int = 0) -> int:
    """Note a release before it is made, so that a crash after it cannot lose it.

    A round that is done again releases again, and is noted again.

    Returns:
        How many releases there are. One with other noise, by another run on the same folder, counts as the number of
        releases with this run's noise that cost as much.

    Raises:
        ConfigError: the ledger is damaged, holds fewer than ``at_least`` releases, or ``dp-max-epsilon`` would be
            passed. Nothing is noted then, and nothing may be released.
    """
    path = make_dir(folder) / LEDGER
    before = read_ledger(path)
    if len(before) < at_least:
        raise ConfigError(
            f"{path} holds {len(before)} releases, and the rounds that are finished made {at_least}: without the "
            "others epsilon is unknown; restore the file, or choose another run-dir"
        )
    noise = config.dp_noise_multiplier
    after = [*before, Release(round_number=round_number, noise_multiplier=noise)]
    releases = math.ceil(sum((noise / release.noise_multiplier) ** 2 for release in after))
    require_within_limit(config, releases, round_number)
    write_atomically(path, "".join(release.model_dump_json() + "\n" for release in after))
    return releases


def require_within_limit(config: RunConfig, releases: int, round_number: int) -> None:
    """Raise ConfigError when so many releases spend more than ``dp-max-epsilon``."""
    epsilon = epsilon_of(releases, config.dp_noise_multiplier, config.dp_delta)
    if 0 < config.dp_max_epsilon < epsilon:
        raise ConfigError(
            f"round {round_number} would take epsilon to {epsilon:.4g} at delta {config.dp_delta:g}, and "
            f"dp-max-epsilon is {config.dp_max_epsilon:g}: what was released before is the last"
        )


def read_ledger(path: Path) -> list[Release]:
    """The releases that are noted; raises ConfigError when they cannot be read."""
    try:
        return [Release.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be read, and without it epsilon is unknown; restore it") from error


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
        ConfigError: see ``note_release``.
    """
    if config.dp == "off":
        return None
    spent = before.releases if before else 0
    if config.dp == "central":
        releases = note_release(run_dir, config, round_number, at_least=spent)
    else:
        releases = max(spent, 1, *(int(min(update.metrics[RELEASES], MAX_RELEASES)) for update in accepted))
    return PrivacySpent(
        dp=config.dp,
        clipping_norm=config.dp_clipping_norm,
        noise_multiplier=config.dp_noise_multiplier,
        releases=releases,
        epsilon=epsilon_of(releases, config.dp_noise_multiplier, config.dp_delta),
        delta=config.dp_delta,
    )


def epsilon_of(releases: int, noise_multiplier: float, delta: float) -> float:
    """The epsilon of so many releases: the exact one (Balle and Wang, arXiv 1805.06083, theorem 8)."""
    mu = SENSITIVITY * math.sqrt(releases) / noise_multiplier

    def excess(epsilon: float) -> float:
        near, far = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
        scaled_tail = math.exp(-near * near / 2) * erfcx(far / math.sqrt(2)) / 2  # exp(epsilon) ndtr(-far)
        return float(ndtr(near) - scaled_tail - delta)

    if excess(0.0) <= 0:
        return 0.0
    enough = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # by the normal distribution's tail bound
    return float(brentq(excess, 0.0, enough))
