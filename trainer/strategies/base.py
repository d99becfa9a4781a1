"""What every strategy is: it gives what is sent, takes updates one at a time, and makes one adapter of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from services.contracts.errors import AdapterError
from trainer.aggregation import Arrays, ClientUpdate, RunningMean
from trainer.lora import claimed_rank, cut, pad


class Strategy(ABC):
    """One way of aggregating. A round is ``begin``, ``add`` for each update in any order, ``finish``.

    Attributes:
        sent: the adapter that this round started from.
        metrics: figures of the last aggregation, for the round's record.
    """

    sent: Arrays
    round_number: int

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Start a round from an adapter; gives what goes to every client."""
        self.sent, self.round_number, self.metrics = adapter, round_number, {}
        return self.sent

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """What a client was given of the ``arrays`` that it sends back: the update is checked against it."""
        return self.sent

    @abstractmethod
    def add(self, update: ClientUpdate) -> None:
        """Take a checked update; raises AdapterError when it is of no use after all."""

    @abstractmethod
    def finish(self) -> Arrays:
        """The aggregate of this round's updates, of which there is at least one."""

    def state(self) -> Arrays:
        """What the next round needs beside the adapter; empty before the first round."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Go on from a saved ``state``."""
        if state:
            raise AdapterError(f"{type(self).__name__} keeps no state, but there is one of {len(state)} arrays")


class MeanStrategy(Strategy):
    """A strategy that needs no more of the updates than their mean, weighted by answer tokens.

    Memory does not grow with the number of clients. An adapter of lower rank counts as if it were filled up with
    zeros (HetLoRA, arXiv 2401.06432), so that its missing components pull the mean towards zero.

    Attributes:
        private_mean: starts the mean of a round under differential privacy, where all clients have the same rank.
    """

    private_mean: Callable[[Arrays], RunningMean] | None = None

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Send the adapter, and start a new mean."""
        self._running = self.private_mean(adapter) if self.private_mean else RunningMean()
        self._full_rank = claimed_rank(adapter, adapter)
        return super().begin(adapter, round_number)

    def reply_reference(self, arrays: Arrays) -> Arrays:
        """The components of the sent adapter that fit the client's rank."""
        rank = claimed_rank(arrays, self.sent)
        return self.sent if self.private_mean or rank == self._full_rank else cut(self.sent, rank, of=self._full_rank)

    def add(self, update: ClientUpdate) -> None:
        """Add it to the mean."""
        rank = claimed_rank(update.arrays, self.sent)
        self._running.add(pad(update.arrays, rank, to=self._full_rank), update.num_tokens)

    def finish(self) -> Arrays:
        """The mean, and what the strategy makes of it."""
        return self.step(self._running.mean())

    def step(self, mean: Arrays) -> Arrays:
        """The new adapter; the mean itself unless a strategy says otherwise."""
        return mean


class CollectingStrategy(Strategy):
    """A strategy that needs all updates at once: memory grows with the number of clients.

    They are kept in the order of client numbers, so that the order of arrival does not show.
    """

    def begin(self, adapter: Arrays, round_number: int) -> Arrays:
        """Send the adapter, and forget the updates of a round that was not finished."""
        self._updates: dict[int, ClientUpdate] = {}
        return super().begin(adapter, round_number)

    def add(self, update: ClientUpdate) -> None:
        """Keep it."""
        self._updates[update.client_id] = update

    def finish(self) -> Arrays:
        """Combine the updates, and let go of them."""
        updates = [self._updates[client] for client in sorted(self._updates)]
        self._updates = {}
        return self.combine(updates)

    @abstractmethod
    def combine(self, updates: list[ClientUpdate]) -> Arrays:
        """The new adapter, of updates sorted by client number."""


def shares(updates: list[ClientUpdate]) -> list[float]:
    """Each client's share of all answer tokens."""
    total = sum(update.num_tokens for update in updates)
    return [update.num_tokens / total for update in updates]
