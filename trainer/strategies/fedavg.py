"""FedAvg (McMahan et al., arXiv 1602.05629): the new adapter is the mean of the clients' adapters.

    A <- sum_i w_i A_i,   B <- sum_i w_i B_i,   w_i = answer tokens of client i / answer tokens of all

A and B are averaged apart, so that the product differs from the mean of the products: with two clients of equal weight
by (B_1 - B_2)(A_1 - A_2) / 4. ``ffa``, ``fedsvd``, ``fedex``, ``flora`` and ``flexlora`` avoid that, each in its way.
Flower's FedAvg keeps every reply until the last is there, and its sum depends on their order; ours does neither.
"""

from trainer.strategies.base import MeanStrategy


class FedAvg(MeanStrategy):
    """The mean, as it is."""
