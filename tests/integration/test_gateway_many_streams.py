"""Many streams open at once through one gateway, and the benchmark that holds 1,000 of them."""

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.bench import soak
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import PATIENT, chat_body, gateway
from tests.fakes.gateway_upstreams import FakeSafety, serving

SLOW = PATIENT | {"check_deadline_ms": 30_000, "connect_seconds": 30, "silence_seconds": 60, "generation_seconds": 120}
STREAMS = 200


def test_two_hundred_streams_are_open_at_once() -> None:
    """Nobody reads on before all have got their first text, so that all are open at that moment."""
    inference, safety = FakeInference(pieces=["One. ", "Two."], pause=lambda i: 0.5 if i == 1 else 0.0), FakeSafety()

    async def read(session: aiohttp.ClientSession, url: str, all_begun: asyncio.Barrier) -> bytes:
        async with session.post(f"{url}/v1/chat/completions", json=chat_body(stream=True)) as response:
            first = await response.content.readuntil(b"One. ")
            await all_begun.wait()
            return first + await response.content.read()

    async def run(url: str) -> list[bytes]:
        all_begun = asyncio.Barrier(STREAMS)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.timeout(120):
            return await asyncio.gather(*(read(session, url, all_begun) for _ in range(STREAMS)))

    with ExitStack() as exits:
        inference_url, safety_url = (exits.enter_context(serving(fake)) for fake in (inference, safety))
        answers = asyncio.run(run(exits.enter_context(gateway(inference_url, safety_url, SLOW))))
    assert len(answers) == STREAMS
    for answer in answers:
        assert b"Two." in answer
        assert answer.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in answer
    assert inference.finished == STREAMS


@pytest.mark.long
def test_a_thousand_streams_are_held_and_let_go_of(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    load = ["--streams", "1000", "--words", "8", "--word-ms", "2000", "--minutes", "1", "--out", str(out)]
    code = soak.main([*load, "--", "--check-deadline-ms", "10000"])  # whether they are held, not how fast
    found: dict[str, Any] = json.loads(out.read_text())
    assert (code, found["failures"]) == (0, {})
    assert found["streams_ended"] >= 3000
    assert found["steady"]["open_at_model"]["low"] >= 950
    assert found["steady"]["open_at_clients"]["low"] >= 800
    assert found["steady"]["leaked_characters"] == 0
    assert found["after_load"]["generations_open"] == 0
    assert found["after_load"]["open_files"] < 50
    assert found["after_load"]["tasks"] < 20
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
