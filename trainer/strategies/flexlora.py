"""FlexLoRA (Bai et al., arXiv 2402.11505): the mean of the products, cut back to the rank by SVD.

    B A  <-  the closest product of rank r to  sum_i w_i (alpha / r_i) B_i A_i / (alpha / r)

Clients may have different ranks r_i: each is sent the r_i largest components of the SVD, which is the best that its
rank can hold. Where the mean has more than r components, the round's record tells the share that was lost
(``truncation-error``). As published, the whole adapter is averaged and not the change: what lies beyond a small
client's rank is thereby pulled towards zero by that client's weight.
"""

from trainer.aggregation import Arrays, ClientUpdate
from trainer.lora import claimed_rank, cut, from_layers, pad, relative_error, stack, to_layers, truncate
from trainer.strategies.base import CollectingStrategy, shares


class FlexLora(CollectingStrategy):
    """Exact as long as the mean's rank allows; clients of several ranks."""

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Send the same adapter with its largest components first; the alignment may have mixed them up."""
        layers = to_layers(adapter)
        self._rank = next(iter(layers.values())).a.shape[0]
        sorted_layers = {name: truncate(pair, self._rank).factors for name, pair in layers.items()}
        return super().begin(from_layers(sorted_layers), round_number)

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """The components that fit the client's rank."""
        return cut(self.sent, claimed_rank(arrays, self.sent), of=self._rank)

    def combine(self, updates: list[ClientUpdate]) -> Arrays:
        """SVD of the weighted sum of products."""
        adapters = [pad(update.arrays, claimed_rank(update.arrays, self.sent), to=self._rank) for update in updates]
        layers = [to_layers(adapter) for adapter in adapters]
        weights = shares(updates)
        exact = {name: stack([layer[name] for layer in layers], weights) for name in layers[0]}
        new = {name: truncate(pair, self._rank) for name, pair in exact.items()}
        self.metrics["truncation-error"] = relative_error(new.values(), exact.values())
        return from_layers({name: result.factors for name, result in new.items()})
