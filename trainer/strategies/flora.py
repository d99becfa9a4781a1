"""FLoRA (Wang et al., arXiv 2409.05976): the clients' factors are stacked, and clients start afresh each round.

    sum_i w_i B_i A_i = [w_1 B_1 ... w_n B_n] [A_1; ...; A_n],   then A <- random, B <- 0

The paper has clients add the stacked product to their base weights, and its rank grows with clients and rounds. Here
it goes, as in ``fedex``, into the last ``residual-rank`` components of the adapter, cut to these by SVD with the error
in the round's record. A starts as PEFT starts it, uniform within 1 / sqrt(in), from the run's seed and the round.
"""

import numpy as np

from trainer.aggregation import Arrays, ClientUpdate
from trainer.lora import Factors, from_layers, to_layers
from trainer.strategies.fedex import FedEx


class Flora(FedEx):
    """The head starts anew; the tail holds everything that was learned."""

    def __init__(self, *, residual_rank: int, seed: int) -> None:
        super().__init__(residual_rank=residual_rank)
        self._seed = seed

    def new_head(self, updates: list[ClientUpdate]) -> Arrays:
        """A at random, B zero: a head that changes nothing yet."""
        generator = np.random.default_rng([self._seed, self.round_number])
        layers = {}
        for name, (a, b) in sorted(to_layers(updates[0].arrays).items()):
            bound = 1 / np.sqrt(a.shape[1])
            layers[name] = Factors(generator.uniform(-bound, bound, a.shape), np.zeros_like(b))
        return from_layers(layers)
