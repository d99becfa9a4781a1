"""Cutting a streamed answer into units, and handing them out in order with their decisions."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy import Action, Decision, Direction
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer, Segmenter
from services.contracts.chat import ChatChunk, ChatDelta, ChunkChoice
from services.contracts.errors import UpstreamUnavailable

ALLOW = Decision(Action.ALLOW, Direction.RESPONSE)
REFUSE = Decision(Action.REFUSE, Direction.RESPONSE)


def cut(pieces: list[str], limit: int = 20) -> list[str]:
    segmenter = Segmenter(limit)
    units = [unit for piece in pieces for unit in segmenter.feed(piece)]
    return [*units, segmenter.rest()]


@pytest.mark.parametrize(
    ("pieces", "units"),
    [
        (["One. Two."], ["One. ", "Two."]),
        (["One", ".", " Two"], ["One. ", "Two"]),
        (["pi is 3.14 or so"], ["pi is 3.14 or so"]),
        (['"Stop!" he said'], ['"Stop!" ', "he said"]),
        (["a list\n\n- item"], ["a list\n\n", "- item"]),
        (["好。再见"], ["好。", "再见"]),
        (["aaaa bbbb cccc dddd eeee"], ["aaaa bbbb cccc dddd ", "eeee"]),
        (["x" * 45], ["x" * 20, "x" * 20, "x" * 5]),
        (["short words and then " + "x" * 30], ["short words and ", "then ", "x" * 20, "x" * 10]),
    ],
)
def test_units(pieces: list[str], units: list[str]) -> None:
    assert cut(pieces) == units


@given(st.lists(st.text(st.sampled_from("ab .!\n。é"))), st.integers(1, 30))
def test_units_are_short_and_joined_are_the_text(pieces: list[str], limit: int) -> None:
    units = cut(pieces, limit)
    assert "".join(units) == "".join(pieces)
    assert all(len(unit) <= limit for unit in units)


@pytest.mark.parametrize(
    ("held", "released"),
    [
        ("half a wo", "half a "),
        ("whole words ", "whole words "),
        ("A sentence.", "A sentence."),
        ("word", ""),
        ("", ""),
    ],
)
def test_pause_cuts_no_word(held: str, released: str) -> None:
    segmenter = Segmenter(200)
    segmenter.feed(held)
    assert segmenter.pause() == released
    assert segmenter.rest() == held[len(released) :]


def settings(**values: int | float) -> GatewaySettings:
    return GatewaySettings.model_validate({"unit_characters": 20, "context_characters": 10} | values)


async def chunks(*texts: str, finish: bool = True) -> AsyncGenerator[ChatChunk, None]:
    for text in texts:
        yield chunk(text)
        await asyncio.sleep(0)
    if finish:
        yield ChatChunk(id="1", created=1, model="m", choices=[ChunkChoice(delta=ChatDelta(), finish_reason="stop")])


def chunk(text: str) -> ChatChunk:
    return ChatChunk(id="1", created=1, model="m", choices=[ChunkChoice(delta=ChatDelta(content=text))])


def test_slow_first_check_holds_back_faster_ones_behind_it() -> None:
    finished = []

    async def check(text: str) -> Decision:
        await asyncio.sleep(0.05 if text.startswith("First") else 0)
        finished.append(text)
        return ALLOW

    async def collect() -> list[str]:
        async with CheckedAnswer(chunks("First. ", "Second. ", "Third."), check, settings()) as answer:
            return [unit async for unit, _ in answer]

    assert asyncio.run(collect()) == ["First. ", "Second. ", "Third."]
    assert finished[-1].startswith("First"), "the checks overlapped"


def test_each_check_sees_bounded_text_before_its_unit() -> None:
    seen = []

    async def check(text: str) -> Decision:
        seen.append(text)
        return ALLOW

    async def run() -> None:
        async with CheckedAnswer(chunks("One one one. ", "Two two. ", "Three."), check, settings()) as answer:
            assert [unit async for unit, _ in answer]

    asyncio.run(run())
    assert seen == ["One one one. ", " one one. Two two. "[-19:], " Two two. Three."]


@pytest.mark.parametrize(
    ("pieces", "units"), [(["... ", "\n\n", "Well. "], ["... \n\nWell. "]), (["... ", "?! "], ["... ?! "])]
)
def test_text_before_the_first_word_waits_for_it(pieces: list[str], units: list[str]) -> None:
    async def check(text: str) -> Decision:
        return ALLOW

    async def collect() -> list[str]:
        async with CheckedAnswer(chunks(*pieces), check, settings()) as answer:
            return [unit async for unit, _ in answer]

    assert asyncio.run(collect()) == units


def test_checks_in_flight_are_bounded() -> None:
    running, most = 0, 0

    async def check(text: str) -> Decision:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return ALLOW

    async def run() -> None:
        async with CheckedAnswer(chunks(*["Words. "] * 30), check, settings(checks_in_flight=3)) as answer:
            assert len([unit async for unit, _ in answer]) == 30

    asyncio.run(run())
    assert most == 3


def test_leaving_stops_the_reading_and_every_check() -> None:
    stopped = []

    async def endless() -> AsyncGenerator[ChatChunk, None]:
        try:
            while True:
                yield chunk("Words. ")
                await asyncio.sleep(0.001)
        finally:
            stopped.append("reading")

    async def check(text: str) -> Decision:
        if len(text) < 10:
            return REFUSE
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append("check")
            raise
        return ALLOW

    async def run() -> None:
        async with CheckedAnswer(endless(), check, settings()) as answer:
            await asyncio.sleep(0.02)
            unit, decision = await anext(answer)
            assert (unit, decision) == ("Words. ", REFUSE)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert "reading" in stopped
    assert "check" in stopped


def test_any_failure_reaches_the_consumer() -> None:
    async def broken() -> AsyncGenerator[ChatChunk, None]:
        yield chunk("One. ")
        raise ZeroDivisionError

    async def allow(text: str) -> Decision:
        return ALLOW

    async def run(source: AsyncGenerator[ChatChunk, None]) -> None:
        async with CheckedAnswer(source, allow, settings()) as answer:
            async for unit, _ in answer:
                assert unit == "One. "

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(run(broken()), 5))
    with pytest.raises(UpstreamUnavailable, match="broke off"):
        asyncio.run(asyncio.wait_for(run(chunks("One. ", finish=False)), 5))


def test_process_loads_no_model_library() -> None:
    heavy = ("torch", "transformers", "numpy", "flwr")
    code = f"import sys, gateway.__main__; sys.exit(', '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"the gateway loads {done.stderr}"


def test_failure_that_nobody_waits_for_is_no_complaint() -> None:
    """Every check fails; the first failure ends the answer, and the others must not end up in the log."""
    complaints: list[dict[str, Any]] = []

    async def fail(text: str) -> Decision:
        raise UpstreamUnavailable("safety", "gone")

    async def first_unit() -> None:
        async with CheckedAnswer(chunks("One. ", "Two. ", "Three. "), fail, settings()) as answer:
            await asyncio.sleep(0.05)
            await anext(answer)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        with pytest.raises(UpstreamUnavailable, match="gone"):
            await first_unit()
        gc.collect()

    asyncio.run(run())
    assert complaints == []


@pytest.mark.parametrize("cancellations", [0, 1, 2])
def test_reading_is_cancelled_once_even_at_its_deadline(cancellations: int) -> None:
    """The reader closes a connection when it is cancelled; a second cancellation would interrupt that."""
    closed = []

    async def slow_to_close() -> AsyncGenerator[ChatChunk, None]:
        try:
            yield chunk("Words. ")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            closed.append("connection")

    async def allow(text: str) -> Decision:
        return ALLOW

    async def read_on() -> None:
        async with CheckedAnswer(slow_to_close(), allow, settings(generation_seconds=0.1)) as answer:
            async for _ in answer:
                pass

    async def run() -> None:
        task = asyncio.create_task(read_on())
        await asyncio.sleep(0.11)
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises((UpstreamUnavailable, asyncio.CancelledError)):
            await task
        await asyncio.sleep(0.1)
        assert closed == ["connection"]

    asyncio.run(run())
