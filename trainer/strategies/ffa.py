"""FFA-LoRA (Sun et al., arXiv 2403.12313): A stays at its shared starting value, only B is trained.

    B <- sum_i w_i B_i,   so that   B A = sum_i w_i B_i A   exactly

Only B comes back, half of the bytes or so. A is sent along each time although it never changes, because a client keeps
nothing from round to round. With noise on the updates, as for differential privacy, A B has one noisy factor, not two.
The constitutional stage trains B only, too.
"""

from trainer.aggregation import Arrays, ClientUpdate
from trainer.lora import b_only
from trainer.strategies.base import MeanStrategy


class FfaLora(MeanStrategy):
    """The mean of the B matrices beside the A that was sent."""

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """The B matrices."""
        return b_only(self.sent)

    def add(self, update: ClientUpdate) -> None:
        """Add it to the mean."""
        self._running.add(update.arrays, update.num_tokens)

    def step(self, mean: Arrays) -> Arrays:
        """The whole adapter."""
        return self.sent | mean
