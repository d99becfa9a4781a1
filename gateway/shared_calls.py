"""Checks of many requests in few calls of the classifier, when there are more than it is asked at once."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from services.contracts.errors import FedwardError, UpstreamRejected, UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, Verdict

Call = Callable[[Sequence[ClassifyItem], float], Awaitable[list[Verdict]]]
MAX_ITEMS = 64  # in one call, unless a single text needs more: the safety service takes 256


@dataclass(eq=False)
class _Job:
    items: Sequence[ClassifyItem]
    until: float  # by the event loop's clock
    verdicts: asyncio.Future[list[Verdict]]


class SharedCalls:
    """At most so many calls at once; what waits for a place goes along in the next call with all that wait.

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
        if not self._free:
            return await self._along(items, seconds)
        self._free -= 1
        try:
            return await self._call(items, seconds)
        finally:
            self._place_is_free()

    async def _along(self, items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        loop = asyncio.get_running_loop()
        job = _Job(items, loop.time() + seconds, loop.create_future())
        self._waiting.append(job)
        try:
            async with asyncio.timeout_at(job.until):
                return await job.verdicts
        except TimeoutError as error:
            raise UpstreamUnavailable("safety", "no answer within the deadline") from error

    def _place_is_free(self) -> None:
        self._free += 1
        jobs = self._take()
        if jobs:
            self._free -= 1
            # In a context of its own: it belongs to several requests, so it carries the id of none.
            task = asyncio.get_running_loop().create_task(self._run(jobs), context=Context())
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

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

    async def _run(self, jobs: Sequence[_Job]) -> None:
        try:
            await self._settle(jobs)
        finally:
            self._place_is_free()

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
        except FedwardError as error:
            _fail(jobs, error)
        else:
            for job in jobs:
                if not job.verdicts.done():
                    job.verdicts.set_result(verdicts[: len(job.items)])
                verdicts = verdicts[len(job.items) :]


def _fail(jobs: Sequence[_Job], error: FedwardError) -> None:
    for job in jobs:
        if not job.verdicts.done():
            job.verdicts.set_exception(error)
