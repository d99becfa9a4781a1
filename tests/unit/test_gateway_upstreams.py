"""Calls that are given up: whatever the moment and however often, no connection stays open and no service at work."""

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
from tests.fakes.gateway_upstreams import FakeInference, FakeSafety, serving

DEADLINE = 0.4


def classify(upstreams: Upstreams) -> Any:
    return upstreams.classify([ClassifyItem(prompt="hi there")], Direction.PROMPT, DEADLINE)


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
