"""FedSVD (Lee et al., arXiv 2505.12805): clients train B only, and A is renewed from what they learned.

    B <- sum_i w_i B_i,   U S V^T = SVD(B A),   then   A <- V^T,   B <- U S

The product stays what it was: it has the rank of the adapter at most, and nothing is cut. The rows of A are orthonormal
and follow the directions that the clients found, where FFA-LoRA keeps the random ones of the start.
"""

from trainer.aggregation import Arrays
from trainer.lora import from_layers, to_layers, truncate
from trainer.strategies.ffa import FfaLora


class FedSvd(FfaLora):
    """The mean of the B matrices, factored anew."""

    def step(self, mean: Arrays) -> Arrays:
        """A with orthonormal rows and the B that goes with it."""
        layers = to_layers(super().step(mean))
        return from_layers({name: truncate(pair, len(pair.a)).factors for name, pair in layers.items()})
