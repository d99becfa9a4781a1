"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), with the control variates of the paper's option II.

    client i, from x = what was sent, for K steps:   y <- y - lr (g_i(y) - c_i + c)
    c_i+ = c_i - c + (x - y) / (K lr)  =  the mean of the gradients g_i over the K steps
    coordinator:   x <- x + rate * mean_i(y_i - x),   c <- c + |S| / N * mean_i(c_i+ - c_i)

S are this round's clients, of N in all. As in the paper every client counts the same, whatever the size of its shard.

The paper's clients take plain SGD steps, for which the two forms of c_i+ are the same. For AdamW they are not:
(x - y) / (K lr) is then a mean of steps that Adam has scaled to the size of 1, and no gradient at all. Ours is always
the mean gradient, and c - c_i is added to the gradient before the optimiser sees it. ``local-optimizer = "sgd"`` is
the paper's algorithm; with ``adamw`` the correction is the paper's and the step is not. ``trainer.local_rules`` has
the clients' side. Gradients are clipped before the correction, so an honest c_i+ is no longer than the clipping norm.
"""

import numpy as np

from services.contracts.errors import AdapterError
from trainer.aggregation import Arrays, ClientUpdate, RunningMean, distance
from trainer.control import split_control, with_control
from trainer.strategies.base import Strategy


class Scaffold(Strategy):
    """Mean of the adapters and of the changes of the control variates; the state is ``c``."""

    def __init__(self, *, learning_rate: float, num_clients: int, max_gradient_norm: float) -> None:
        super().__init__()
        self._rate = np.float32(learning_rate)
        self._num_clients = num_clients
        self._longest_change = 2.001 * max_gradient_norm  # from one mean gradient to another, with room for rounding
        self._control: Arrays = {}

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Send the adapter together with c, which starts at 0."""
        zeros = {name: np.zeros_like(array) for name, array in adapter.items()}
        self._control = self._control or zeros
        self._adapters, self._changes = RunningMean(), RunningMean()
        self._zeros = zeros
        super().begin(adapter, round_number)
        return with_control(adapter, self._control)

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """The adapter, and no change of the control variate."""
        return with_control(self.sent, self._zeros)

    def add(self, update: ClientUpdate) -> None:
        """Take the update; raises AdapterError when its control variate cannot be a mean of clipped gradients."""
        adapter, change = split_control(update.arrays)
        if (length := distance(change, self._zeros)) > self._longest_change:
            raise AdapterError(
                f"client {update.client_id}: its control variate changed by {length:.4g}, and clipped gradients "
                f"allow {self._longest_change:.4g}"
            )
        self._adapters.add(adapter, 1)
        self._changes.add(change, 1)

    def finish(self) -> Arrays:
        """Step towards the mean adapter, and keep the new c."""
        share = np.float32(self._changes.weight / self._num_clients)
        self._control = {name: self._control[name] + share * change for name, change in self._changes.mean().items()}
        mean = self._adapters.mean()
        return {name: sent + self._rate * (mean[name] - sent) for name, sent in self.sent.items()}

    def state(self) -> Arrays:
        """The coordinator's control variate."""
        return self._control

    def restore(self, state: Arrays) -> None:
        """Take up the control variate."""
        self._control = state
