"""FedAdam, FedYogi and FedAdagrad (Reddi et al., arXiv 2003.00295): adaptive steps of the coordinator.

    d = mean - sent,   m <- beta_1 m + (1 - beta_1) d
    v <- beta_2 v + (1 - beta_2) d^2                      FedAdam; beta_1 = beta_2 = 0 in FedAdagrad, where v <- v + d^2
    v <- v - (1 - beta_2) d^2 sign(v - d^2)               FedYogi
    new = sent + rate * m / (sqrt(v) + tau)

The formulas are those of Flower's classes, which are given the finished mean as if it were one client's reply, and
what was sent anew each round. Flower's FedAdam also corrects the rate for the first rounds' bias, which the paper does
not.
"""

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi

from trainer.aggregation import Arrays
from trainer.strategies.base import MeanStrategy
from trainer.strategies.flower import WEIGHT, aggregate


class FedOpt(MeanStrategy):
    """A step of one of Flower's adaptive strategies; the state is ``m`` and ``v``."""

    def __init__(self, name: str, *, learning_rate: float, beta_1: float, beta_2: float, tau: float) -> None:
        super().__init__()
        self._flower: FedAdam | FedYogi | FedAdagrad
        if name == "fedadagrad":
            self._flower = FedAdagrad(weighted_by_key=WEIGHT, eta=learning_rate, tau=tau)
        else:
            adaptive = FedAdam if name == "fedadam" else FedYogi
            self._flower = adaptive(weighted_by_key=WEIGHT, eta=learning_rate, beta_1=beta_1, beta_2=beta_2, tau=tau)

    def step(self, mean: Arrays) -> Arrays:
        """Flower's step from the adapter that was sent."""
        self._flower.current_arrays = dict(self.sent)
        return aggregate(self._flower, self.round_number, [(mean, 1)])

    def state(self) -> Arrays:
        """Both moments."""
        moments = {"m": self._flower.m_t, "v": self._flower.v_t}
        return {f"{kind}/{name}": array for kind, arrays in moments.items() for name, array in (arrays or {}).items()}

    def restore(self, state: Arrays) -> None:
        """Take up both moments."""
        for kind in ("m", "v"):
            arrays = {name.removeprefix(f"{kind}/"): array for name, array in state.items() if name[:2] == f"{kind}/"}
            setattr(self._flower, f"{kind}_t", arrays or None)
