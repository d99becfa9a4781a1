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

from gateway.admission import policy_of_settings
from gateway.answers import CONTENT, Call, Event, Finish, Head, Part, Token, Unit
from gateway.policy import Action, Decision, Direction, StreamPolicy
from gateway.segments import Segmenter
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer
from services.contracts.errors import UpstreamUnavailable

HEAD = Head("1", 1, "m")
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


def stream_of(values: GatewaySettings) -> StreamPolicy:
    return policy_of_settings(values).stream


async def chunks(*texts: str, finish: bool = True) -> AsyncGenerator[Event, None]:
    for text in texts:
        yield said(text)
        await asyncio.sleep(0)
    if finish:
        yield ended()


def said(text: str, index: int = 0, channel: str = CONTENT) -> Event:
    return Event(HEAD, [Part(index, channel, text)], {})


def ended(index: int = 0) -> Event:
    return Event(HEAD, [], {index: Finish("stop")})


async def arriving(*parts: Event) -> AsyncGenerator[Event, None]:
    for event in parts:
        yield event
        await asyncio.sleep(0)


async def allow(index: int, texts: list[str]) -> Decision:
    return ALLOW


def answer_of(source: AsyncGenerator[Event, None], check: Any = allow, **values: int | float) -> CheckedAnswer:
    return CheckedAnswer(source, check, stream_of(settings(**values)), settings(**values), 1)


async def released(answer: CheckedAnswer) -> list[str]:
    """The content of every unit; the last unit of an answer that ends with a whole sentence has none."""
    async with answer:
        return [unit.text() async for unit, _ in answer]


def test_slow_first_check_holds_back_faster_ones_behind_it() -> None:
    finished = []

    async def check(index: int, texts: list[str]) -> Decision:
        await asyncio.sleep(0.05 if texts == ["First. "] else 0)
        finished.append(texts)
        return ALLOW

    units = asyncio.run(released(answer_of(chunks("First. ", "Second. ", "Third."), check)))
    assert units == ["First. ", "Second. ", "Third."]
    assert finished[-1] == ["First. "], "the checks overlapped"


def test_each_check_sees_bounded_text_before_its_unit() -> None:
    seen = []

    async def check(index: int, texts: list[str]) -> Decision:
        seen.append(texts)
        return ALLOW

    asyncio.run(released(answer_of(chunks("One one one. ", "Two two. ", "Three."), check)))
    assert seen == [["One one one. "], [" one one. Two two. "], ["One one one. Two two. Three."]]


@pytest.mark.parametrize(
    ("pieces", "units"), [(["... ", "\n\n", "Well. "], ["... \n\nWell. ", ""]), (["... ", "?! "], ["... ?! "])]
)
def test_text_before_the_first_word_waits_for_it(pieces: list[str], units: list[str]) -> None:
    assert asyncio.run(released(answer_of(chunks(*pieces)))) == units


def collected(parts: list[Event], choices: int = 1, check: Any = allow) -> list[Unit]:
    async def run() -> list[Unit]:
        async with CheckedAnswer(arriving(*parts), check, stream_of(settings()), settings(), choices) as answer:
            return [unit async for unit, _ in answer]

    return asyncio.run(run())


def test_calls_are_held_until_the_choice_has_ended() -> None:
    pieces = [Call(0, "call_1", "find", '{"q'), Call(1, "call_2", "get", "{}"), Call(0, "", "", 'uery": 1}')]
    units = collected([Event(HEAD, [Part.of_call(0, "tool_calls", piece)], {}) for piece in pieces] + [ended()])
    assert [part.call for unit in units for part in unit.parts] == [
        Call(0, "call_1", "find", '{"query": 1}'),
        Call(1, "call_2", "get", "{}"),
    ]
    assert len(units) == 1


def test_whole_choice_is_checked_before_its_end() -> None:
    seen: list[tuple[int, list[str]]] = []

    async def check(index: int, texts: list[str]) -> Decision:
        seen.append((index, texts))
        return ALLOW

    call = Part.of_call(0, "tool_calls", Call(0, "call_1", "find", '{"q": "\\u0068i"}'))
    parts = [
        said("Thinking of it", channel="reasoning"),
        said("Yes. "),
        Event(HEAD, [call], {}),
        said("It is"),
        ended(),
    ]
    collected(parts, check=check)
    assert seen == [
        (0, ["Thinking of "]),
        (0, ["Yes. "]),
        (0, ["Thinking of it", "Yes. It is", 'find\n{"q": "\\u0068i"}', "call_1", '{"q": "\\u0068i"}\nq\nhi']),
    ]


def test_channels_and_choices_are_cut_by_themselves() -> None:
    parts = [said("One and ", 0), said("Two and ", 1), said("so on. ", 0), said("more. ", 1), ended(1), ended(0)]
    units = collected(parts, 2)
    assert [(unit.index, unit.text()) for unit in units] == [
        (0, "One and so on. "),
        (1, "Two and more. "),
        (1, ""),
        (0, ""),
    ]


@pytest.mark.parametrize("event", [said("x", 1), ended(1), said("x", -1)])
def test_choice_that_nobody_asked_for_is_an_error(event: Event) -> None:
    with pytest.raises(UpstreamUnavailable, match="more answers"):
        collected([event, ended()])


def test_text_after_the_end_of_a_choice_is_dropped() -> None:
    units = collected([said("One. ", 0), ended(0), said("More. ", 0), said("Two. ", 1), ended(1)], 2)
    assert [unit.text() for unit in units] == ["One. ", "", "Two. ", ""]


def test_tokens_leave_with_the_text_that_they_end_in() -> None:
    def told(text: str, other: str) -> Event:
        return Event(HEAD, [Part(0, CONTENT, text, (Token({"text": text}, (text, other)),))], {})

    seen: list[list[str]] = []

    async def check(index: int, texts: list[str]) -> Decision:
        seen.append(texts)
        return ALLOW

    units = collected([told("One. T", "a"), told("wo. ", "b"), told("Three", "c"), ended()], check=check)
    assert [(unit.text(), [token.shape["text"] for token in unit.tokens()]) for unit in units] == [
        ("One. ", []),
        ("Two. ", ["One. T", "wo. "]),
        ("Three", ["Three"]),
    ]
    assert seen == [["One. "], ["One. Two. ", "ab"], ["One. Two. Three", "abc"]]


def test_dropped_choice_ends_and_the_others_go_on() -> None:
    async def check(index: int, texts: list[str]) -> Decision:
        return REFUSE if "bad" in texts[0] else ALLOW

    async def run() -> list[tuple[int, str]]:
        parts = [said("Good. ", 0), said("A bad one. ", 1), said("More. ", 1), said("Fine. ", 0), ended(1), ended(0)]
        units = []
        async with CheckedAnswer(arriving(*parts), check, stream_of(settings()), settings(), 2) as answer:
            async for unit, decision in answer:
                if decision.allowed:
                    units.append((unit.index, unit.text()))
                else:
                    answer.drop(unit.index)
        return units

    assert asyncio.run(run()) == [(0, "Good. "), (0, "Fine. "), (0, "")]


def test_leaving_stops_the_reading_and_every_check() -> None:
    stopped = []

    async def endless() -> AsyncGenerator[Event, None]:
        try:
            while True:
                yield said("Words. ")
                await asyncio.sleep(0.001)
        finally:
            stopped.append("reading")

    checks = 0

    async def check(index: int, texts: list[str]) -> Decision:
        nonlocal checks
        checks += 1
        if checks == 1:
            return REFUSE
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append("check")
            raise
        return ALLOW

    async def run() -> None:
        async with answer_of(endless(), check) as answer:
            await asyncio.sleep(0.02)
            unit, decision = await anext(answer)
            assert (unit.text(), decision) == ("Words. ", REFUSE)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert "reading" in stopped
    assert "check" in stopped


def test_any_failure_reaches_the_consumer() -> None:
    async def broken() -> AsyncGenerator[Event, None]:
        yield said("One. ")
        raise ZeroDivisionError

    async def run(source: AsyncGenerator[Event, None]) -> None:
        async with answer_of(source) as answer:
            async for unit, _ in answer:
                assert unit.text() == "One. "

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

    async def fail(index: int, texts: list[str]) -> Decision:
        raise UpstreamUnavailable("safety", "gone")

    async def first_unit() -> None:
        async with answer_of(chunks("One. ", "Two. ", "Three. "), fail) as answer:
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

    async def slow_to_close() -> AsyncGenerator[Event, None]:
        try:
            yield said("Words. ")
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            closed.append("connection")

    async def read_on() -> None:
        async with answer_of(slow_to_close(), generation_seconds=0.1) as answer:
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
