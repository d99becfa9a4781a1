"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): A and B are averaged, and the error of that is carried along.

    A <- sum_i w_i A_i,   B <- sum_i w_i B_i,   R <- R + sum_i w_i B_i A_i - B A

The paper adds R, times alpha / r, to the frozen base weights. Here only adapters travel and are served, so R lives in
the adapter: of its ``lora-rank`` components the last ``residual-rank`` hold R, which clients do not train and do not
send back. One adapter has one factor alpha / r, so that factor cannot be forgotten for R. R gains up to
(clients - 1) x head rank components a round; beyond ``residual-rank`` it is cut by SVD, and the round's record tells
the share that was lost (``truncation-error``, of the whole product). The sum is exact where that is 0.
"""

from trainer.aggregation import Arrays, ClientUpdate, RunningMean
from trainer.lora import Factors, Truncated, from_layers, head, relative_error, stack, to_layers, truncate
from trainer.strategies.base import CollectingStrategy, shares


class FedEx(CollectingStrategy):
    """Averages the head of the adapter, and keeps what that misses in its tail."""

    def __init__(self, *, residual_rank: int) -> None:
        super().__init__()
        self._residual_rank = residual_rank

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Send head and tail."""
        self._head_rank = next(iter(to_layers(adapter).values())).a.shape[0] - self._residual_rank
        return super().begin(adapter, round_number)

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """The head."""
        return head(self.sent, self._head_rank)

    def combine(self, updates: list[ClientUpdate]) -> Arrays:
        """The new head, and the tail that makes the product right."""
        new_head = to_layers(self.new_head(updates))
        clients = [to_layers(update.arrays) for update in updates]
        weights = shares(updates)
        exact: dict[str, Factors] = {}
        tails: dict[str, Truncated] = {}
        for name, pair in to_layers(self.sent).items():
            tail = Factors(pair.a[self._head_rank :], pair.b[:, self._head_rank :])
            exact[name] = stack([tail, *(layers[name] for layers in clients)], [1.0, *weights])
            tails[name] = truncate(stack([exact[name], new_head[name]], [1.0, -1.0]), self._residual_rank)
        self.metrics["truncation-error"] = relative_error(tails.values(), exact.values())
        return from_layers({
            name: stack([new_head[name], result.factors], [1.0, 1.0]) for name, result in tails.items()
        })  # fmt: skip

    def new_head(self, updates: list[ClientUpdate]) -> Arrays:
        """What clients go on training from: the mean of A and of B."""
        running = RunningMean()
        for update in updates:
            running.add(update.arrays, update.num_tokens)
        return running.mean()
