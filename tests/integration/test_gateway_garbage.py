"""What a request took is freed when it ends: a full garbage collection would hold up all streams."""

import gc
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from gateway.answers import Part
from gateway.request import Request
from gateway.streaming import CheckedAnswer
from gateway.visits import Visit
from tests.fakes.gateway_stack import Stack, chat_body, wait_for, words
from tests.fakes.gateway_upstreams import MARKER

BELONGING_TO_A_REQUEST = (Visit, Request, CheckedAnswer, Part)


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> int:
    """How many objects of requests there are; other tests may have left some."""
    return sum(type(held) in BELONGING_TO_A_REQUEST for held in gc.get_objects())


def leave(stack: Stack, text_first: bool) -> None:
    """Ask for a stream, and leave before its first text or after it."""
    stack.answer(words(60, sentence=5), pause=lambda i: 0.05 if text_first else 5.0)
    body = chat_body(stream=True)
    with (
        suppress(httpx.ReadTimeout),
        stack.client.stream("POST", "/v1/chat/completions", json=body, timeout=5.0 if text_first else 0.5) as response,
    ):
        next(response.iter_lines())


def ask_for_nothing_good(stack: Stack, stream: bool, what: str) -> None:
    """A request that does not end as it should; its status is another test's matter."""
    match what:
        case "prompt check hangs":
            stack.break_safety("hang", "prompt")
        case "answer check hangs":
            stack.break_safety("hang", "response")
        case "unsafe answer":
            stack.answer(words(20, marker_at=12, sentence=5))
        case "model refuses":
            stack.inference.fault = "400"
        case "client leaves at once" | "client leaves later":
            return leave(stack, what == "client leaves later")
    stack.ask(f"Say {MARKER}" if what == "unsafe prompt" else "Hello", stream=stream)
    return None


CASES = ("nothing wrong", "prompt check hangs", "answer check hangs", "unsafe prompt", "unsafe answer", "model refuses")


@pytest.mark.long  # reads all objects of the process: not beside thousands of other tests
@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(
    ("what", "stream"),
    [(what, stream) for what in CASES for stream in (False, True)]
    + [("client leaves at once", True), ("client leaves later", True)],
)
def test_requests_leave_nothing_to_the_garbage_collector(stack: Stack, what: str, stream: bool) -> None:
    stack.answer(words(20, sentence=5))
    before = alive()
    for _ in range(3):
        ask_for_nothing_good(stack, stream, what)
    wait_for(lambda: alive() <= before)
