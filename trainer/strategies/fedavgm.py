"""FedAvgM (Hsu et al., arXiv 1909.06335): the coordinator takes the mean update as a gradient, with momentum.

    g = sent - mean,   m <- momentum * m + g,   new = sent - rate * m

The formula is Flower's ``FedAvgM``, which is given the finished mean as if it were one client's reply: the mean of one
reply is that reply. What was sent is told to it anew each round: Flower's loop takes the aggregate for it, and ours
may have aligned that since.
"""

from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM

from trainer.aggregation import Arrays
from trainer.strategies.base import MeanStrategy
from trainer.strategies.flower import WEIGHT, aggregate, to_record


class FedAvgM(MeanStrategy):
    """Momentum on the coordinator; the state is ``m``."""

    def __init__(self, *, learning_rate: float, momentum: float) -> None:
        super().__init__()
        self._flower = FlowerFedAvgM(
            weighted_by_key=WEIGHT, server_learning_rate=learning_rate, server_momentum=momentum
        )

    def step(self, mean: Arrays) -> Arrays:
        """Flower's step; its momentum is a list in the order of the names."""
        self._names = sorted(mean)
        self._flower.current_arrays = to_record({name: self.sent[name] for name in self._names})
        return aggregate(self._flower, self.round_number, [({name: mean[name] for name in self._names}, 1)])

    def state(self) -> Arrays:
        """The momentum."""
        momentum = self._flower.momentum_vector
        return {} if momentum is None else dict(zip(self._names, momentum, strict=True))

    def restore(self, state: Arrays) -> None:
        """Take up the momentum."""
        self._names = sorted(state)
        self._flower.momentum_vector = [state[name] for name in self._names] or None
