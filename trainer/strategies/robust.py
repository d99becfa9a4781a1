"""Robust rules, by Flower's own classes: what a few clients send cannot move the aggregate at will.

    median, trimmed-mean   coordinate by coordinate (Yin et al., arXiv 1803.01498)
    krum, multikrum        the update, or the n - f updates, nearest to others (Blanchard et al., arXiv 1703.02757)
    bulyan                 Multi-Krum, then a trimmed mean around the median (El Mhamdi et al., arXiv 1802.07927)

n is the number of updates, f the number of them that may be hostile (``malicious-clients``). All updates are held at
once, so memory grows with n. Krum and Multi-Krum weigh what they select by answer tokens, the others weigh all alike.
Two studies of safety poisoning (arXiv 2406.10630, 2411.19335) find that such rules hardly help against it: take them
as one layer.
"""

import gc

from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from trainer.aggregation import Arrays, ClientUpdate
from trainer.strategies.base import CollectingStrategy
from trainer.strategies.flower import WEIGHT, aggregate


class Robust(CollectingStrategy):
    """One of the rules."""

    def __init__(self, rule: str, *, malicious: int) -> None:
        super().__init__()
        self._rule, self._malicious = rule, malicious

    def combine(self, updates: list[ClientUpdate]) -> Arrays:
        """Flower's aggregate."""
        flower = self._flower(len(updates))
        gc.freeze()  # Flower's Bulyan collects garbage after each array: 0.1 s every time, beside a loaded model
        try:
            return aggregate(flower, self.round_number, [(update.arrays, update.num_tokens) for update in updates])
        finally:
            gc.unfreeze()

    def _flower(self, count: int) -> FedAvg:
        hostile = self._malicious
        match self._rule:
            case "median":
                return FedMedian(weighted_by_key=WEIGHT)
            case "trimmed-mean":  # Flower cuts int(beta * count) at each end; the quarter keeps it from one too few
                return FedTrimmedAvg(weighted_by_key=WEIGHT, beta=(hostile + 0.25) / count)
            case "krum":
                return Krum(weighted_by_key=WEIGHT, num_malicious_nodes=hostile)
            case "multikrum":
                return MultiKrum(
                    weighted_by_key=WEIGHT, num_malicious_nodes=hostile, num_nodes_to_select=count - hostile
                )
            case "bulyan":
                return Bulyan(weighted_by_key=WEIGHT, num_malicious_nodes=hostile)
            case _:
                raise ValueError(f"no robust rule {self._rule!r}")
