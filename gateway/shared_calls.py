"""The checks of one tenant's requests in few calls of the classifier."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial

from services.contracts.errors import UpstreamRejected, UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, Verdict

Call = Callable[[Sequence[ClassifyItem], float], Awaitable[list[Verdict]]]
MAX_ITEMS = 64  # in one call, unless a single text needs more: the safety service takes 256


@dataclass(eq=False)
class _Job:
    items: Sequence[ClassifyItem]
    until: float  # by the event loop's clock
    verdicts: asyncio.Future[list[Verdict]]
    context: Context


class SharedCalls:
    """What is asked in the same moment, or waits for a place, goes together in the next call.

    A call costs the gateway as much as the verdicts on a dozen texts. Without this a thousand checks of one moment, as
    after a short outage, would be a thousand calls, miss their deadlines, and come again with the next attempt.

    Args:
        call: one verdict per item, within seconds.
        at_once: calls that may run at the same time.
    """

    def __init__(self, call: Call, at_once: int) -> None:
        self._call = call
        self._free = at_once
        self._waiting: deque[_Job] = deque()
        self._calls: set[asyncio.Task[None]] = set()  # the event loop does not keep them alive

    async def classify(self, items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        """One verdict per item, within seconds, of which waiting is a part.

        Raises:
            UpstreamUnavailable: none in time, or as ``call`` raises it.
            UpstreamRejected: as ``call`` raises it; only for the items that are the reason.
        """
        loop = asyncio.get_running_loop()
        job = _Job(items, loop.time() + seconds, loop.create_future(), copy_context())
        self._waiting.append(job)
        loop.call_soon(self._start_calls)
        try:
            async with asyncio.timeout_at(job.until):
                return await job.verdicts
        except TimeoutError as error:
            raise UpstreamUnavailable("safety", "no answer within the deadline") from error

    def _start_calls(self) -> None:
        loop = asyncio.get_running_loop()
        while self._free and (jobs := self._take()):
            self._free -= 1
            # By its own task, for it must not end with the first of its requests, whose id it bears.
            call = loop.create_task(self._settle(jobs), context=jobs[0].context)
            self._calls.add(call)
            call.add_done_callback(self._ended)
            everybody = asyncio.gather(*(job.verdicts for job in jobs), return_exceptions=True)
            everybody.add_done_callback(partial(_end_early, call, max(job.until for job in jobs)))

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._free += 1
        self._start_calls()

    def _take(self) -> list[_Job]:
        """The first jobs in line that somebody still waits for, as many as fit into one call."""
        jobs: list[_Job] = []
        size = 0
        while self._waiting and (not jobs or size + len(self._waiting[0].items) <= MAX_ITEMS):
            job = self._waiting.popleft()
            if not job.verdicts.done():
                jobs.append(job)
                size += len(job.items)
        return jobs

    async def _settle(self, jobs: Sequence[_Job]) -> None:
        seconds = max(job.until for job in jobs) - asyncio.get_running_loop().time()
        try:
            verdicts = await self._call([item for job in jobs for item in job.items], seconds)
        except UpstreamRejected as error:
            if len(jobs) == 1:
                _fail(jobs, error)
                return
            for job in jobs:  # one text that the classifier refuses must not fail the others
                if not job.verdicts.done():
                    await self._settle([job])
        except Exception as error:  # whatever it is, those who wait have to learn of it
            _fail(jobs, error)
        else:
            for job in jobs:
                if not job.verdicts.done():
                    job.verdicts.set_result(verdicts[: len(job.items)])
                verdicts = verdicts[len(job.items) :]


def _end_early(call: asyncio.Task[None], until: float, everybody: asyncio.Future[list[object]]) -> None:
    """End a call for which nobody waits any more; but one that is late has to be seen to fail (``breaker.py``)."""
    if asyncio.get_running_loop().time() < until:
        call.cancel()


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.verdicts.done():
            job.verdicts.set_exception(error)
