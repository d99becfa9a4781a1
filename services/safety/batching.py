"""Dynamic micro-batching with length buckets, in front of a scorer.

Nothing waits for company: whatever is pending when a thread becomes free forms the next batch. The oldest pending
window always goes into it, so that nothing starves, and the rest of the batch are windows of about its length. All
state belongs to the event loop; only ``run`` itself is called in threads.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from prometheus_client import Gauge, Histogram

from services.contracts.errors import Overloaded, RequestError
from services.safety.embedded.scores import Floats, Window

BATCH = Histogram("fedward_safety_batch_windows", "Windows scored in one batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
PENDING = Gauge("fedward_safety_pending_windows", "Windows that wait for a place in a batch")
BUCKET = 16  # windows whose lengths round up to the same multiple of this may share a batch


class _Request:
    """One call of ``submit``: the rows that it has so far, by the place of their window, and its outcome."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: dict[int, Floats] = {}
        self.outcome: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()


class _Pending(NamedTuple):
    """A window that waits; the lowest ``number`` is the oldest."""

    number: int
    window: Window
    request: _Request
    place: int


class MicroBatcher:
    """Batches the windows of concurrent requests. Create it anywhere, use it on one event loop.

    Args:
        run: scores (n, K) of n windows; called in a thread.
        queue_windows: the most windows that may be pending.
        batch_windows: the most windows in a batch.
        batch_tokens: the most words or tokens in a batch, counted as windows x the longest of them, which is what
            memory and time go by. A window that is longer than this goes alone.
        threads: how many batches may be at work at once.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Window]], Floats],
        *,
        queue_windows: int,
        batch_windows: int = 16,
        batch_tokens: int = 2048,
        threads: int = 1,
    ) -> None:
        self._run = run
        self._queue_windows = queue_windows
        self._batch_windows = batch_windows
        self._batch_tokens = batch_tokens
        self._idle_threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self._buckets: dict[int, deque[_Pending]] = {}  # no bucket is empty, and each has its oldest window first
        self._waiting = 0
        self._numbers = itertools.count()
        self._closed = False

    async def submit(self, windows: Sequence[Window], seconds: float) -> Floats:
        """Scores (n, K) of the windows, in their order; (0, 0) of none, whatever the queue holds.

        Args:
            windows: what is to be scored.
            seconds: how long the caller waits. Its windows that are still pending then are never computed, and
                neither are those of a caller that is cancelled.

        Raises:
            Overloaded: the queue is full, there was no result in time, or the batcher is closed.
            RequestError: more windows than the queue ever takes.
            Exception: whatever ``run`` raises on a batch with a window of this request.
        """
        if not windows:
            return np.empty((0, 0), np.float32)
        self._admit(len(windows))
        request = _Request(len(windows))
        for place, window in enumerate(windows):
            bucket = self._buckets.setdefault(-(-len(window) // BUCKET), deque())
            bucket.append(_Pending(next(self._numbers), window, request, place))
        self._count(len(windows))
        self._start_batches()
        try:
            await asyncio.wait([request.outcome], timeout=seconds)
        finally:
            if not request.outcome.done():
                request.outcome.cancel()
                self._drop(request)
        if request.outcome.cancelled():
            raise Overloaded(f"no result within the deadline of {seconds:g} seconds; try again later")
        return request.outcome.result()

    def close(self) -> None:
        """Refuse what is pending and whatever comes, and wait for the batches at work, whose results still count."""
        self._closed = True
        for request in {pending.request for bucket in self._buckets.values() for pending in bucket}:
            self._fail(request, _closing())
        self._pool.shutdown(wait=True)

    def _admit(self, count: int) -> None:
        if self._closed:
            raise _closing()
        if count > self._queue_windows:
            raise RequestError(
                f"the request has {count} windows of text and at most {self._queue_windows} are taken; "
                "send fewer or shorter items at once"
            )
        if self._waiting + count > self._queue_windows:
            raise Overloaded(
                f"{self._waiting} windows of text wait, the request has {count} and the limit is "
                f"{self._queue_windows}; try again later"
            )

    def _start_batches(self) -> None:
        """Give every idle thread a batch, as long as there is something pending."""
        while self._buckets and self._idle_threads:
            self._idle_threads -= 1
            batch = self._next_batch()
            BATCH.observe(len(batch))
            windows = [pending.window for pending in batch]
            scores = asyncio.get_running_loop().run_in_executor(self._pool, self._run, windows)
            scores.add_done_callback(partial(self._finish, batch))

    def _next_batch(self) -> list[_Pending]:
        """Take the oldest pending window, and those after it in its bucket as far as the caps allow."""
        key, bucket = min(self._buckets.items(), key=lambda item: item[1][0].number)
        batch = [bucket.popleft()]
        longest = len(batch[0].window)
        while bucket and len(batch) < self._batch_windows:
            longest = max(longest, len(bucket[0].window))
            if (len(batch) + 1) * longest > self._batch_tokens:
                break
            batch.append(bucket.popleft())
        if not bucket:
            del self._buckets[key]
        self._count(-len(batch))
        return batch

    def _finish(self, batch: list[_Pending], scores: "asyncio.Future[Floats]") -> None:
        """Hand a batch's rows, or its failure, to its requests, and start the next batch."""
        self._idle_threads += 1
        if error := scores.exception():
            for request in {pending.request for pending in batch}:
                self._fail(request, error)
        else:
            for pending, row in zip(batch, scores.result(), strict=True):
                self._deliver(pending, row)
        self._start_batches()

    def _deliver(self, pending: _Pending, row: Floats) -> None:
        request = pending.request
        request.rows[pending.place] = row
        if len(request.rows) == request.size and not request.outcome.done():
            request.outcome.set_result(np.stack([request.rows[place] for place in range(request.size)]))

    def _fail(self, request: _Request, error: BaseException) -> None:
        if not request.outcome.done():
            request.outcome.set_exception(error)
            self._drop(request)

    def _drop(self, request: _Request) -> None:
        """Forget the pending windows of a request that nobody waits for any more."""
        for key, bucket in list(self._buckets.items()):
            kept = deque(pending for pending in bucket if pending.request is not request)
            self._count(len(kept) - len(bucket))
            if kept:
                self._buckets[key] = kept
            else:
                del self._buckets[key]

    def _count(self, change: int) -> None:
        self._waiting += change
        PENDING.inc(change)


def _closing() -> Overloaded:
    return Overloaded("the service is shutting down; try another replica")
