"""The engine: one worker thread that writes all answers, in batches, from a bounded queue."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from services.common.logs import get_logger
from services.contracts.errors import FedwardError, Overloaded
from services.inference.batch import Batch
from services.inference.generation import Generation, Variant
from services.inference.metrics import WAITING

Action = Callable[[Batch], None]


class GenerationFailed(FedwardError):
    """The model could not write this answer (out of memory, for example); the log has the reason."""

    code = "generation_failed"


class Engine:
    """Takes generations from any thread and writes them in batches, one batch for each variant in use.

    Waiting requests join between two steps, first come, first served, as long as there is room. An answer is
    written by the variant it was submitted with, whatever is loaded or released in the meantime.

    Args:
        max_batch: most answers in work at the same time, over all variants.
        max_waiting: most requests that wait.
    """

    def __init__(self, *, max_batch: int, max_waiting: int) -> None:
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._batches: dict[Variant, Batch] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the worker thread; answers that are not finished end with an error."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """The worker thread runs."""
        return self._thread.is_alive()

    def submit(self, generation: Generation) -> None:
        """Queue an answer; raises Overloaded when the queue is full."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.over)
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting, which is the limit; try again later")
            self._waiting.append(generation)
            WAITING.set(len(self._waiting))
            self._changed.notify()

    def _work(self) -> None:
        while not self._stopped:
            for variant in list(self._batches):
                self._attempt(variant, Batch.leave)
            self._batches = {variant: batch for variant, batch in self._batches.items() if len(batch)}
            for variant, joining in self._take().items():
                self._attempt(variant, partial(Batch.admit, generations=joining), joining)
            for variant in list(self._batches):
                self._attempt(variant, Batch.step)
        self._fail([*self._waiting, *(g for batch in self._batches.values() for g in batch.generations)])

    def _take(self) -> dict[Variant, list[Generation]]:
        """The requests that join now, by variant; waits when there is nothing else to do."""
        with self._changed:
            while not (self._waiting or self._batches or self._stopped):
                self._changed.wait()
            free = self._max_batch - sum(len(batch) for batch in self._batches.values())
            taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            WAITING.set(len(self._waiting))
        groups: dict[Variant, list[Generation]] = {}
        for generation in taken:
            if not generation.over:
                groups.setdefault(generation.variant, []).append(generation)
        return groups

    def _attempt(self, variant: Variant, action: Action, joining: Sequence[Generation] = ()) -> None:
        """Do one thing with a variant's batch. A failure ends the answers of this batch and no others."""
        batch = self._batches.setdefault(variant, Batch(variant.network))
        try:
            action(batch)
        except Exception as error:  # whatever a model may raise: the worker lives on for the other answers
            get_logger().error("generation failed", variant=variant.name, rows=len(batch), exc_info=error)
            del self._batches[variant]
            self._fail([*batch.generations, *joining])

    def _fail(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            if not generation.over:
                generation.fail(GenerationFailed("the answer could not be generated; the service's log has the reason"))
