"""The strategies of aggregation, one a file, and the choice among them; docs/aggregation.md compares them."""

import logging
from collections.abc import Callable

from trainer.config import B_ONLY, ROBUST_NEEDS, RunConfig
from trainer.privacy import NoisedMean, UniformMean, mechanism_of
from trainer.sft import MAX_GRADIENT_NORM
from trainer.strategies.base import MeanStrategy, Strategy
from trainer.strategies.fedavg import FedAvg
from trainer.strategies.fedavgm import FedAvgM
from trainer.strategies.fedex import FedEx
from trainer.strategies.fedopt import FedOpt
from trainer.strategies.fedprox import FedProx
from trainer.strategies.fedsvd import FedSvd
from trainer.strategies.ffa import FfaLora
from trainer.strategies.flexlora import FlexLora
from trainer.strategies.flora import Flora
from trainer.strategies.robust import Robust
from trainer.strategies.scaffold import Scaffold

__all__ = ["Strategy", "make_strategy"]

log = logging.getLogger("flwr")


def _fedopt(config: RunConfig) -> Strategy:
    return FedOpt(
        config.strategy,
        learning_rate=config.server_rate,
        beta_1=config.server_momentum,
        beta_2=config.server_beta2,
        tau=config.server_tau,
    )


MAKERS: dict[str, Callable[[RunConfig], Strategy]] = {
    "fedavg": lambda config: FedAvg(),
    "fedprox": lambda config: FedProx(),
    "fedavgm": lambda config: FedAvgM(learning_rate=config.server_rate, momentum=config.server_momentum),
    **dict.fromkeys(("fedadam", "fedyogi", "fedadagrad"), _fedopt),
    "scaffold": lambda config: Scaffold(
        learning_rate=config.server_rate, num_clients=config.num_clients, max_gradient_norm=MAX_GRADIENT_NORM
    ),
    "ffa-lora": lambda config: FfaLora(),
    "fedsvd": lambda config: FedSvd(),
    "flexlora": lambda config: FlexLora(),
    "fedex-lora": lambda config: FedEx(residual_rank=config.residual_rank),
    "flora": lambda config: Flora(residual_rank=config.residual_rank, seed=config.seed),
    **dict.fromkeys(ROBUST_NEEDS, lambda config: Robust(config.strategy, malicious=config.malicious_clients)),
}


def make_strategy(config: RunConfig) -> Strategy:
    """The strategy that a run asks for, with the run's differential privacy."""
    strategy = MAKERS[config.strategy](config)
    if config.dp == "off":
        return strategy
    assert isinstance(strategy, MeanStrategy)  # RunConfig refuses dp with any other
    if config.strategy not in B_ONLY:
        log.warning(
            "dp=%s with strategy=%s puts noise on A and on B: their product multiplies the two noises; with ffa-lora "
            "there is noise on B alone",
            config.dp, config.strategy,
        )  # fmt: skip
    mechanism = mechanism_of(config)
    central = config.dp == "central"
    strategy.private_mean = (lambda sent: NoisedMean(mechanism, sent)) if central else (lambda sent: UniformMean())
    return strategy
