"""What a request took is freed when it ends: a full garbage collection would hold up all streams."""

import gc
from collections.abc import Iterator

import pytest

from gateway.answers import Part
from gateway.request import Request
from gateway.streaming import CheckedAnswer
from gateway.visits import Visit
from tests.fakes.gateway_stack import Stack, wait_for, words

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


@pytest.mark.long  # reads all objects of the process: not beside thousands of other tests
@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", [None, "prompt", "response"])
def test_requests_leave_nothing_to_the_garbage_collector(stack: Stack, stream: bool, broken: str | None) -> None:
    stack.answer(words(20, sentence=5))
    if broken:
        stack.break_safety("hang", broken)
    before = alive()
    for _ in range(3):
        answer = stack.ask(stream=stream)
        assert answer.status_code == (200 if broken is None else 503)
    wait_for(lambda: alive() <= before)
