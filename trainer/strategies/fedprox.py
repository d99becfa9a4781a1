"""FedProx (Li et al., arXiv 1812.06127): clients are held near the adapter that they were sent.

    client i minimises  f_i(w) + mu / 2 * ||w - w_sent||^2,   the coordinator averages as FedAvg does

The norm is squared, as in the paper; the example in Flower's documentation sums plain norms. The term's gradient,
mu (w - w_sent), is added by ``trainer.local_rules``; clients read mu (``proximal-mu``) from the run's configuration.
The loss that is reported is f_i alone.
"""

from trainer.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """On the coordinator it is FedAvg."""
