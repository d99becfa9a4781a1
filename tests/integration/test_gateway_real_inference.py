"""The gateway in front of the real inference service with a tiny model, by other people's clients."""

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionMessageParam

from gateway.app import build_app
from gateway.settings import GatewaySettings
from tests.fakes.gateway_stack import PATIENT
from tests.fakes.gateway_upstreams import MARKER, FakeSafety, serving
from tests.fakes.model_servers import serving_inference
from tests.fakes.tiny_model import build_tiny_model

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How do I bake bread?"}]


class Urls:
    """Where the gateway and the service behind it listen."""

    def __init__(self, gateway: str, inference: str) -> None:
        self.gateway = gateway
        self.inference = inference


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    model = build_tiny_model(tmp_path_factory.mktemp("gateway") / "tiny")
    with ExitStack() as exits:
        inference = exits.enter_context(serving_inference(model))
        safety = exits.enter_context(serving(FakeSafety()))
        values = PATIENT | {"inference_url": inference, "safety_url": safety, "generation_seconds": 60.0}
        yield Urls(exits.enter_context(serving(build_app(GatewaySettings(**values)))), inference)


@pytest.fixture
def client(urls: Urls) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{urls.gateway}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_is_the_services_own_answer(urls: Urls, client: openai.OpenAI) -> None:
    body = {"model": "fedward", "messages": ASK, "max_tokens": 12, "seed": 1}
    direct = httpx.post(f"{urls.inference}/v1/chat/completions", json=body, timeout=20).json()
    answer = client.chat.completions.create(model="fedward", messages=ASK, max_tokens=12, seed=1)
    assert answer.choices[0].message.content == direct["choices"][0]["message"]["content"]
    assert answer.system_fingerprint == direct["system_fingerprint"]
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == direct["usage"]
    chunks = client.chat.completions.create(model="fedward", messages=ASK, max_tokens=12, seed=1, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_text_completion_is_scored_as_the_service_scores_it(urls: Urls, client: openai.OpenAI) -> None:
    body = {"model": "fedward", "prompt": "How do I bake bread?", "max_tokens": 4, "echo": True, "logprobs": 2}
    direct = httpx.post(f"{urls.inference}/v1/completions", json=body, timeout=20).json()["choices"][0]
    answer = client.completions.create(
        model="fedward", prompt="How do I bake bread?", max_tokens=4, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert (choice.text, choice.finish_reason) == (direct["text"], direct["finish_reason"])
    assert choice.logprobs.model_dump() == direct["logprobs"]
    chunks = list(client.completions.create(model="fedward", prompt="How do I bake bread?", max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == direct["text"].removeprefix("How do I bake bread?")


def test_generation_is_the_services_own_answer(urls: Urls) -> None:
    ours, theirs = InferenceClient(urls.gateway), InferenceClient(urls.inference)
    prompt = "How do I bake bread?"
    for details in (False, True):
        assert ours.text_generation(prompt, max_new_tokens=8, details=details) == theirs.text_generation(
            prompt, max_new_tokens=8, details=details
        )
        streams = [
            client.text_generation(prompt, max_new_tokens=8, stream=True, details=details) for client in (ours, theirs)
        ]
        assert list(streams[0]) == list(streams[1])


def test_models_and_info(urls: Urls, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fedward"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=ASK)
    told, direct = (httpx.get(f"{url}/info").json() for url in (urls.gateway, urls.inference))
    assert (told["model_id"], told["router"]) == ("fedward", "fedward-gateway")
    assert told.items() - direct.items() == {("model_id", "fedward"), ("router", "fedward-gateway")}


def test_services_own_refusal_is_passed_on(urls: Urls, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 128 tokens"):
        client.chat.completions.create(model="fedward", messages=ASK, max_tokens=500)
    refused = httpx.post(f"{urls.gateway}/generate", json={"inputs": "hi", "parameters": {"max_new_tokens": 500}})
    assert refused.status_code == 422
    assert refused.json()["error_type"] == "validation"
    assert "context is 128 tokens" in refused.json()["error"]


def test_blocked_prompt(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fedward", messages=[{"role": "user", "content": MARKER}])
    assert answer.choices[0].finish_reason == "content_filter"
