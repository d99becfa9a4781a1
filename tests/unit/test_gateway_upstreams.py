"""Calls of services: given up without leaving anything behind, and made again only where nothing can come of it."""

import asyncio
from typing import Any

import pytest

from gateway.asked import Asked
from gateway.policy import Direction
from gateway.protocols import chat
from gateway.settings import GatewaySettings
from gateway.upstreams import Upstreams
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_upstreams import FakeSafety, raw_server, serving

DEADLINE = 0.4


def classify(upstreams: Upstreams) -> Any:
    return upstreams.classify("tenant", [ClassifyItem(prompt="hi there")], Direction.PROMPT, DEADLINE)


def complete(upstreams: Upstreams) -> Any:
    return upstreams.complete(chat, Asked("fake", (), (), b'{"model": "fake", "stream": false}', stream=False))


@pytest.mark.parametrize("call", [classify, complete])
@pytest.mark.parametrize("cancellations", [1, 2, 3])
def test_call_that_is_given_up_leaves_nothing_behind(call: Any, cancellations: int) -> None:
    """Some are cancelled before their deadline, some after it, and some in the very moment."""
    safety, inference = FakeSafety(fault="hang"), FakeInference(fault="hang")

    async def give_up(upstreams: Upstreams, after: float) -> None:
        task = asyncio.create_task(call(upstreams))
        await asyncio.sleep(after)
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises((UpstreamUnavailable, asyncio.CancelledError)):
            await task

    async def run(safety_url: str, inference_url: str) -> None:
        settings = GatewaySettings.model_validate(
            {
                "safety_url": safety_url,
                "inference_url": inference_url,
                "check_deadline_ms": DEADLINE * 1000,
                "generation_seconds": DEADLINE,
            }
        )
        upstreams = Upstreams(settings)
        await give_up(upstreams, DEADLINE)  # by itself: the first call loads what all need
        await asyncio.gather(*(give_up(upstreams, DEADLINE + step / 2000) for step in range(-10, 10)))
        async with asyncio.timeout(10):
            while safety.at_work or inference.at_work:  # noqa: ASYNC110  (looks into another thread)
                await asyncio.sleep(0.01)
        await upstreams.close()

    with serving(safety) as safety_url, serving(inference) as inference_url:
        asyncio.run(run(safety_url, inference_url))
    assert len(safety.requests) + len(inference.requests) >= 2, "the calls had reached the service"


VERDICT = b'{"verdicts": [{"outcome": "safe", "score": 0.1, "model_id": "fake"}]}'
GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(VERDICT), VERDICT)
CUT = GOOD[:-9]
DOWN = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("call", "answers", "calls", "good"),
    [
        (classify, [b"", GOOD], 2, True),
        (classify, [b"", b"", GOOD], 2, False),
        (classify, [CUT, GOOD], 1, False),
        (classify, [DOWN, GOOD], 1, False),
        (complete, [b"", GOOD], 1, False),
    ],
    ids=["check", "only once", "not after a head", "not after an error", "never a generation"],
)
def test_call_is_made_again_when_the_connection_ends_before_an_answer(
    call: Any, answers: list[bytes], calls: int, good: bool
) -> None:
    received: list[bytes] = []

    async def run(url: str) -> None:
        settings = GatewaySettings.model_validate({"safety_url": url, "inference_url": url, "check_deadline_ms": 5000})
        upstreams = Upstreams(settings)
        try:
            if good:
                assert [verdict.model_id for verdict in await call(upstreams)] == ["fake"]
            else:
                with pytest.raises(UpstreamUnavailable):
                    await call(upstreams)
        finally:
            await upstreams.close()

    with raw_server(*answers, received=received) as url:
        asyncio.run(run(url))
    assert len(received) == calls
    assert len(set(received)) == 1
