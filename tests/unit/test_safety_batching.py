"""The micro-batcher with real threads and a scorer that says what it was given."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.contracts.errors import Overloaded, RequestError
from services.safety.batching import BUCKET, MicroBatcher
from services.safety.embedded.scores import Floats, Window

PATIENCE = 20.0
POISON = -1


class Recorder:
    """A scorer that keeps its batches, waits at a gate, and fails on a poisoned window.

    A window is a list of one number, repeated; its row is that number and the window's length.
    """

    def __init__(self) -> None:
        self.batches: list[list[Window]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def __call__(self, windows: Sequence[Window]) -> Floats:
        self.batches.append(list(windows))
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        if any(window[0] == POISON for window in windows):
            raise ValueError("a window that no model can read")
        return np.array([[window[0], len(window)] for window in windows], np.float32)

    async def wait_begun(self) -> None:
        """Until one more batch has begun."""
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE)

    def numbers(self) -> list[list[int]]:
        return [[window[0] for window in batch] for batch in self.batches]


def window(number: int, length: int = 1) -> list[int]:
    return [number] * length


@contextmanager
def batching(queue_windows: int = 1000, **options: Any) -> Iterator[tuple[MicroBatcher, Recorder]]:
    recorder = Recorder()
    batcher = MicroBatcher(recorder, queue_windows=queue_windows, **options)
    try:
        yield batcher, recorder
    finally:
        recorder.gate.set()
        batcher.close()
    assert pending() == 0


def pending() -> float:
    return REGISTRY.get_sample_value("fedward_safety_pending_windows") or 0.0


async def occupy(batcher: MicroBatcher, recorder: Recorder, number: int = 0) -> "asyncio.Task[Floats]":
    """A request that is at work and stays there until the gate opens: whatever comes now has to wait."""
    recorder.gate.clear()
    task = asyncio.create_task(batcher.submit([window(number)], PATIENCE))
    await recorder.wait_begun()
    return task


async def begun(*requests: Coroutine[Any, Any, Floats]) -> "list[asyncio.Task[Floats]]":
    """The requests as tasks that have all run up to where they wait."""
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    return tasks


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(main())


LENGTHS = st.integers(1, 100)


@given(st.lists(st.lists(LENGTHS, max_size=12), max_size=12), st.integers(1, 8), st.integers(1, 300), st.integers(1, 3))
def test_rows_come_in_order_and_no_batch_is_over_a_cap(
    requests: list[list[int]], batch_windows: int, batch_tokens: int, threads: int
) -> None:
    async def test() -> None:
        caps = {"batch_windows": batch_windows, "batch_tokens": batch_tokens}
        with batching(threads=threads, **caps) as (batcher, recorder):
            given = [[window(row * 100 + i, n) for i, n in enumerate(lengths)] for row, lengths in enumerate(requests)]
            rows = await asyncio.gather(*(batcher.submit(windows, PATIENCE) for windows in given))
        for windows, scores in zip(given, rows, strict=True):
            assert scores.tolist() == [[one[0], len(one)] for one in windows]
        for batch in recorder.batches:
            lengths = [len(one) for one in batch]
            assert len(batch) <= batch_windows
            assert len(batch) == 1 or len(batch) * max(lengths) <= batch_tokens
            assert len({-(-length // BUCKET) for length in lengths}) == 1
        assert sum(map(len, recorder.batches)) == sum(map(len, given)), "each window is scored exactly once"

    run(test)


def test_whatever_is_pending_forms_the_next_batch() -> None:
    async def test() -> None:
        with batching() as (batcher, recorder):
            first = await occupy(batcher, recorder)
            rest = await begun(*(batcher.submit([window(n)], PATIENCE) for n in (1, 2, 3)))
            assert pending() == 3
            recorder.gate.set()
            await asyncio.gather(first, *rest)
        assert recorder.numbers() == [[0], [1, 2, 3]]

    run(test)


def test_oldest_window_goes_next_whatever_its_length() -> None:
    """A stream of short windows does not keep the one long window from its turn."""

    async def test() -> None:
        with batching(batch_windows=2) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            lengths = [1, 90, 1, 1, 1, 1]
            rest = await begun(*(batcher.submit([window(n, size)], PATIENCE) for n, size in enumerate(lengths, 1)))
            recorder.gate.set()
            await asyncio.gather(first, *rest)
        assert recorder.numbers() == [[0], [1, 3], [2], [4, 5], [6]]

    run(test)


def test_full_queue_refuses_and_takes_again_when_it_has_room() -> None:
    async def test() -> None:
        with batching(queue_windows=3) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            rest = await begun(batcher.submit([window(1), window(2)], PATIENCE))
            with pytest.raises(Overloaded, match=r"2 windows of text wait, the request has 2 and the limit is 3"):
                await batcher.submit([window(3), window(4)], PATIENCE)
            rest += await begun(batcher.submit([window(5)], PATIENCE))
            recorder.gate.set()
            await asyncio.gather(first, *rest)
            assert len(await batcher.submit([window(3), window(4)], PATIENCE)) == 2
        assert recorder.numbers() == [[0], [1, 2, 5], [3, 4]]

    run(test)


def test_request_that_never_fits_is_told_so() -> None:
    async def test() -> None:
        with batching(queue_windows=3) as (batcher, recorder):
            (task,) = await begun(batcher.submit([window(n) for n in range(4)], PATIENCE))
            with pytest.raises(RequestError, match=r"has 4 windows of text and at most 3 are taken"):
                await task
        assert recorder.batches == []

    run(test)


def test_deadline_drops_what_is_pending() -> None:
    async def test() -> None:
        with batching() as (batcher, recorder):
            first = await occupy(batcher, recorder)
            late = asyncio.create_task(batcher.submit([window(1), window(2, 50)], 0.01))
            other = asyncio.create_task(batcher.submit([window(3)], PATIENCE))
            with pytest.raises(Overloaded, match=r"deadline of 0\.01 seconds"):
                await late
            assert pending() == 1
            recorder.gate.set()
            await asyncio.gather(first, other)
        assert recorder.numbers() == [[0], [3]]

    run(test)


def test_deadline_counts_for_a_batch_at_work_too() -> None:
    async def test() -> None:
        with batching() as (batcher, recorder):
            recorder.gate.clear()
            with pytest.raises(Overloaded, match="deadline"):
                await batcher.submit([window(1)], 0.01)
            recorder.gate.set()
            assert (await batcher.submit([window(2)], PATIENCE)).tolist() == [[2, 1]]

    run(test)


def test_cancelled_request_leaves_nothing_behind() -> None:
    async def test() -> None:
        with batching(queue_windows=2) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            (left,) = await begun(batcher.submit([window(1), window(2)], PATIENCE))
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            (other,) = await begun(batcher.submit([window(3), window(4)], PATIENCE))
            recorder.gate.set()
            await asyncio.gather(first, other)
        assert recorder.numbers() == [[0], [3, 4]]

    run(test)


def test_failure_reaches_the_requests_of_its_batch_alone() -> None:
    async def test() -> None:
        with batching(batch_windows=2) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            poisoned = [window(POISON), window(2, 50)]  # its second window waits in another bucket
            rest = await begun(*(batcher.submit(windows, PATIENCE) for windows in (poisoned, [window(3)], [window(4)])))
            recorder.gate.set()
            results = await asyncio.gather(first, *rest, return_exceptions=True)
            assert [type(result) for result in results] == [np.ndarray, ValueError, ValueError, np.ndarray]
            assert len(await batcher.submit([window(5)], PATIENCE)) == 1
        assert recorder.numbers() == [[0], [POISON, 3], [4], [5]], "what is left of a failed request is not computed"

    run(test)


def test_close_finishes_what_is_at_work_and_refuses_the_rest() -> None:
    async def test() -> None:
        with batching() as (batcher, recorder):
            first = await occupy(batcher, recorder)
            (waiting,) = await begun(batcher.submit([window(1)], PATIENCE))
            threading.Timer(0.05, recorder.gate.set).start()
            batcher.close()
            assert (await first).tolist() == [[0, 1]]
            for refused in (waiting, batcher.submit([window(2)], PATIENCE)):
                with pytest.raises(Overloaded, match="shutting down"):
                    await refused
        assert recorder.numbers() == [[0]]

    run(test)


def test_threads_work_at_the_same_time() -> None:
    async def test() -> None:
        with batching(threads=2) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            second = await occupy(batcher, recorder, 1)  # has begun although the first has not ended
            (third,) = await begun(batcher.submit([window(2)], PATIENCE))
            assert pending() == 1
            assert len(recorder.batches) == 2
            recorder.gate.set()
            await asyncio.gather(first, second, third)
        assert recorder.numbers() == [[0], [1], [2]]

    run(test)


def test_no_windows_give_no_rows_even_when_the_queue_is_full() -> None:
    async def test() -> None:
        with batching(queue_windows=1) as (batcher, recorder):
            first = await occupy(batcher, recorder)
            (waiting,) = await begun(batcher.submit([window(1)], PATIENCE))
            assert (await batcher.submit([], PATIENCE)).shape == (0, 0)
            recorder.gate.set()
            await asyncio.gather(first, waiting)
        assert recorder.numbers() == [[0], [1]]

    run(test)


def test_batch_sizes_are_measured() -> None:
    async def test() -> None:
        names = ("fedward_safety_batch_windows_count", "fedward_safety_batch_windows_sum")
        before = [REGISTRY.get_sample_value(name) or 0.0 for name in names]
        with batching(batch_windows=4) as (batcher, _):
            await batcher.submit([window(n) for n in range(6)], PATIENCE)
        after = [REGISTRY.get_sample_value(name) or 0.0 for name in names]
        assert [new - old for new, old in zip(after, before, strict=True)] == [2.0, 6.0]

    run(test)
