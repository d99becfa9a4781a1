"""The mock services as a process: what they answer, how they fail, what they count, and that they end."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from gateway.bench.client import Answer, Target, ask
from gateway.bench.mock_answers import LITELLM_CHECK, WEBHOOK
from gateway.bench.script import MARKER, Fault, Script
from gateway.bench.services import MockServices, mock_services
from services.contracts.chat import ChatCompletion
from services.contracts.verdicts import ClassifyResponse, Outcome


@pytest.fixture(scope="module")
def services() -> Iterator[MockServices]:
    with mock_services(None) as running:
        yield running


def chat(services: MockServices, patience: float = 5.0, **fields: Any) -> Answer:
    async def run() -> Answer:
        async with aiohttp.ClientSession() as session:
            target = Target(f"{services.upstream_url}/v1/chat/completions", {}, {})
            return await ask(session, target, patience, **fields)

    return asyncio.run(run())


def check(services: MockServices, path: str, body: Any, seconds: float = 5.0) -> httpx.Response:
    return httpx.post(f"{services.classifier_url}{path}", json=body, timeout=seconds, trust_env=False)


@pytest.mark.parametrize(("prompt", "outcome"), [("Hello", Outcome.SAFE), (f"Hello {MARKER}", Outcome.UNSAFE)])
def test_classifier_speaks_the_shape_of_every_peer(services: MockServices, prompt: str, outcome: Outcome) -> None:
    services.follow(Script())
    ours = check(services, "/v1/classify", {"items": [{"prompt": "Hello"}, {"prompt": prompt}]})
    assert [v.outcome for v in ClassifyResponse.model_validate_json(ours.content).verdicts] == [Outcome.SAFE, outcome]
    litellm = check(services, LITELLM_CHECK.decode(), {"texts": [prompt]}).json()
    assert litellm["action"] == ("NONE" if outcome == Outcome.SAFE else "BLOCKED")
    assert check(services, WEBHOOK.decode(), {"request": prompt}).json() == {"verdict": outcome == Outcome.SAFE}
    assert services.counters().checks == 3


def test_model_answers_with_the_words_of_the_script(services: MockServices) -> None:
    script = Script(words=20, marker_at=3)
    services.follow(script)
    completion = ChatCompletion.model_validate_json(chat(services).raw)
    assert completion.choices[0].message.content == script.text()
    streamed = chat(services, stream=True)
    assert (streamed.status, streamed.end, streamed.text) == (200, "complete", script.text())
    assert streamed.raw.count(b"data: ") == 20 + 3
    assert services.counters().generations == 2


@pytest.mark.parametrize(
    ("fault", "status", "end"),
    [
        ("down", None, "cut off"),
        ("500", 500, "complete"),
        ("garbage", 200, "complete"),
        ("reset", 200, "cut off"),
        ("drip", 200, "still waiting"),
        ("hang", None, "still waiting"),
    ],
)
def test_model_fails_as_it_is_told_and_then_works_again(
    services: MockServices, fault: Fault, status: int | None, end: str
) -> None:
    services.follow(Script(upstream_fault=fault))
    failed = chat(services, patience=1.5 if fault in ("drip", "hang") else 10.0)
    assert (failed.status, failed.end) == (status, end)
    services.follow(Script())
    assert chat(services).status == 200


@pytest.mark.parametrize("fault", ["hang", "reset", "garbage", "drip"])
def test_stream_fails_in_its_middle(services: MockServices, fault: Fault) -> None:
    script = Script(upstream_fault=fault, word_seconds=0.002)
    services.follow(script)
    answer = chat(services, patience=1.5 if fault in ("drip", "hang") else 10.0, stream=True)
    first_words = "".join(f"word{i} " for i in range(10))
    assert answer.text == first_words or (
        fault == "reset" and first_words.startswith(answer.text)
    )  # a reset drops some
    assert answer.end == ("still waiting" if fault in ("hang", "drip") else "cut off")


@pytest.mark.parametrize("fault", ["down", "500", "reset"])
def test_classifier_fails_only_after_so_many_checks(services: MockServices, fault: Fault) -> None:
    services.follow(Script(classifier_fault=fault, fault_after=1))
    item = {"items": [{"prompt": "Hello"}]}
    assert check(services, "/v1/classify", item).status_code == 200
    if fault == "500":
        assert check(services, "/v1/classify", item).status_code == 500
    else:
        with pytest.raises(httpx.TransportError):
            check(services, "/v1/classify", item)


def test_generation_whose_client_has_left_is_not_open_any_more(services: MockServices) -> None:
    services.follow(Script(words=1000, word_seconds=0.01))
    assert chat(services, patience=0.2, stream=True).end == "still waiting"
    for _ in range(200):
        if services.counters().generations_open == 0:
            break
    counters = services.counters()
    assert (counters.generations, counters.generations_open) == (1, 0)


def test_any_get_is_answered(services: MockServices) -> None:
    assert httpx.get(f"{services.classifier_url}/health/ready", trust_env=False).json() == {"status": "ready"}
    models = httpx.get(f"{services.upstream_url}/v1/models", trust_env=False).json()
    assert [model["id"] for model in models["data"]] == ["bench"]


def test_mock_services_end_with_their_block() -> None:
    before = set(psutil.Process().children())
    with mock_services(None) as services:
        started = set(psutil.Process().children()) - before
        assert json.loads(httpx.get(f"{services.upstream_url}/", trust_env=False).content)
        assert len(started) == 1
    assert not any(process.is_running() for process in started)
