"""A bounded queue in front of the classifier: one thread works, the event loop stays free."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.contracts.errors import Overloaded

T = TypeVar("T")


class WorkQueue:
    """Runs one job at a time in a thread and refuses jobs when too many wait.

    One thread: the work is Python and holds the interpreter's lock, so more would only take turns.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="classify")

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result; raises Overloaded when ``limit`` jobs are at work or waiting, else what the job raises."""
        if self._jobs >= self.limit:
            raise Overloaded(f"{self._jobs} requests wait or are at work, the limit is {self.limit}; try again later")
        self._jobs += 1
        # The count follows the job and not the caller: a job whose caller has gone is still at work.
        future = self._thread.submit(job)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finish))
        return await asyncio.wrap_future(future)

    def _finish(self) -> None:
        self._jobs -= 1

    def close(self) -> None:
        """Let the job at work finish and take no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)
