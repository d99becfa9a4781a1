"""Other people's clients against the gateway, unchanged: OpenAI's, Hugging Face's, LangChain's, and curl."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, ValidationError
from langchain_core.messages import AIMessageChunk, ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import SecretStr

from tests.fakes.gateway_stack import Stack, words
from tests.fakes.gateway_upstreams import BLAND, MARKER

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
UNSAFE: list[ChatCompletionMessageParam] = [{"role": "user", "content": MARKER}]
ASKED = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
TOOLS: list[ChatCompletionToolParam] = [{"type": "function", "function": WEATHER}]  # type: ignore[typeddict-item]
CALL = ("weather", ['{"pla', 'ce": "Oslo"}'])


# OpenAI


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(stack: Stack, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.choices[0].message.content == BLAND
    blocked = client.chat.completions.create(model="fake", messages=UNSAFE)
    assert blocked.choices[0].finish_reason == "content_filter"
    assert blocked.model_extra is not None
    assert blocked.model_extra["fedward"]["blocked"] is True
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="secret", messages=HELLO)
    stack.break_safety("hang", "prompt")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="fake", messages=HELLO)


def test_openai_chat_stream(stack: Stack, client: openai.OpenAI) -> None:
    stack.answer(words(60, sentence=6), usage=True)
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == stack.inference.text
    assert chunks[-1].usage is not None
    stack.answer(words(60, 25, sentence=6))
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    stack.answer(words(12, sentence=3), pause=lambda i: 0.05 if i % 3 == 0 else 0)
    stack.break_safety("500", "response", text="word6")
    with pytest.raises(openai.APIError, match="safety: answered HTTP 500"):
        list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))


def test_openai_tools(stack: Stack, client: openai.OpenAI) -> None:
    stack.answer([""], calls=[CALL])
    answer = client.chat.completions.create(model="fake", messages=HELLO, tools=TOOLS, tool_choice="auto")
    message = answer.choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    assert message.tool_calls[0].function.arguments == '{"place": "Oslo"}'
    stack.answer([BLAND], calls=[])
    told: Any = [*HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    assert client.chat.completions.create(model="fake", messages=told, tools=TOOLS).choices[0].message.content == BLAND
    stack.answer([""], calls=[CALL])
    with client.chat.completions.stream(model="fake", messages=HELLO, tools=TOOLS) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls is not None
    assert final.tool_calls[0].function.arguments == '{"place": "Oslo"}'


def test_openai_choices_and_logprobs(stack: Stack, client: openai.OpenAI) -> None:
    stack.answer(["One ", "two. "], others=[["Three. "]], alternatives=["Uno ", "dos. "])
    answer = client.chat.completions.create(model="fake", messages=HELLO, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == ["One two. ", "Three. "]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [token.token for token in answer.choices[0].logprobs.content] == ["One ", "two. "]
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, n=2, stream=True))
    for i, text in enumerate(["One two. ", "Three. "]):
        said = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == i]
        assert "".join(choice.delta.content or "" for choice in said) == text


def test_openai_completions_models_moderations(stack: Stack, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="Hello", echo=True, logprobs=1)
    assert answer.choices[0].text == BLAND
    chunks = list(client.completions.create(model="fake", prompt="Hello", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == BLAND
    assert chunks[-1].choices[0].finish_reason == "stop"
    blocked = client.completions.create(model="fake", prompt=MARKER)
    assert blocked.choices[0].finish_reason == "content_filter"
    with pytest.raises(openai.BadRequestError, match="token ids cannot be checked"):
        client.completions.create(model="fake", prompt=[1, 2, 3])
    assert [model.id for model in client.models.list()] == ["fake", "other"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("secret")
    assert client.moderations.create(input="fine").results[0].flagged is False


def test_openai_async(stack: Stack) -> None:
    stack.answer(words(30, sentence=6))

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO)
            assert answer.choices[0].message.content == stack.inference.text
            stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == stack.inference.text
            completion = await client.completions.create(model="fake", prompt="Hello")
            assert completion.choices[0].text == stack.inference.text

    asyncio.run(run())


# Hugging Face


def test_hugging_face_chat(stack: Stack) -> None:
    client = InferenceClient(base_url=stack.url)
    answer = client.chat_completion(ASKED, max_tokens=9, temperature=0.5, seed=1)
    assert answer.choices[0].message.content == BLAND
    blocked = client.chat_completion([{"role": "user", "content": MARKER}], model="fake")
    assert blocked.choices[0].finish_reason == "content_filter"
    with pytest.raises(HfHubHTTPError, match="404"):
        client.chat_completion(ASKED, model="secret")
    stack.break_safety("500", "prompt")
    with pytest.raises(HfHubHTTPError, match="503"):
        client.chat_completion(ASKED, model="fake")


def test_hugging_face_chat_stream(stack: Stack) -> None:
    client = InferenceClient(base_url=stack.url)
    stack.answer(words(60, sentence=6))
    chunks = list(client.chat_completion(ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stack.inference.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    stack.answer(words(60, 25, sentence=6))
    chunks = list(client.chat_completion(ASKED, stream=True))
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert MARKER not in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_hugging_face_generation(stack: Stack) -> None:
    client = InferenceClient(stack.url)
    assert client.text_generation("Hello", max_new_tokens=5) == BLAND
    stack.answer(["One ", "two."], alternatives=["Uno ", "dos."])
    detailed = client.text_generation("Hello", details=True, top_n_tokens=2, stop=["never"])
    assert detailed.generated_text == "One two."
    assert detailed.details is not None
    assert [token.text for token in detailed.details.tokens] == ["One ", "two."]
    assert detailed.details.finish_reason == "eos_token"
    blocked = client.text_generation(MARKER, details=True)
    assert blocked.details is not None
    assert str(blocked.details.finish_reason) == "content_filter"
    assert blocked.generated_text.startswith("I'm sorry")


def test_hugging_face_generation_stream(stack: Stack) -> None:
    client = InferenceClient(stack.url)
    stack.answer(words(60, sentence=6))
    assert "".join(client.text_generation("Hello", stream=True)) == f"{stack.inference.text}</s>", "as TGI's own"
    events = list(client.text_generation("Hello", stream=True, details=True))
    assert [event.token.text for event in events[:-1]] == stack.inference.pieces
    assert (events[-1].token.special, events[-1].generated_text) == (True, stack.inference.text)
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "eos_token"


def test_hugging_face_generation_stream_is_blocked(stack: Stack) -> None:
    client = InferenceClient(stack.url)
    stack.answer(words(60, 25, sentence=6))
    events = list(client.text_generation("Hello", stream=True, details=True))
    released = "".join(event.token.text for event in events)
    assert stack.inference.text.startswith(released)
    assert events[-1].generated_text == released
    assert events[-1].details is not None
    assert str(events[-1].details.finish_reason) == "content_filter"
    refused = "".join(client.text_generation(MARKER, stream=True))
    assert refused.startswith("I'm sorry")


def test_hugging_face_generation_errors(stack: Stack) -> None:
    client = InferenceClient(stack.url)
    with pytest.raises(ValidationError, match="no words"):
        client.text_generation("?!")
    stack.break_safety("500", "prompt")
    with pytest.raises(GenerationError, match="safety: answered HTTP 500"):
        client.text_generation("Hello")
    stack.answer(words(12, sentence=3), pause=lambda i: 0.05 if i % 3 == 0 else 0)
    stack.break_safety("500", "response", text="word6")
    with pytest.raises(GenerationError, match="safety: answered HTTP 500"):
        list(client.text_generation("Hello", stream=True))


def test_hugging_face_async(stack: Stack) -> None:
    stack.answer(words(30, sentence=6))

    async def run() -> None:
        async with AsyncInferenceClient(stack.url) as client:
            assert await client.text_generation("Hello") == stack.inference.text
            tokens = [token async for token in await client.text_generation("Hello", stream=True)]
            assert "".join(tokens[:-1]) == stack.inference.text
            answer = await client.chat_completion(ASKED)
            assert answer.choices[0].message.content == stack.inference.text
            chunks = [chunk async for chunk in await client.chat_completion(ASKED, stream=True)]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stack.inference.text

    asyncio.run(run())


# LangChain


def langchain(stack: Stack, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model="fake", base_url=f"{stack.url}/v1", api_key=SecretStr("none"), max_retries=0, **fields)


def test_langchain_chat_and_stream(stack: Stack) -> None:
    stack.answer(words(30, sentence=6), usage=True)
    model = langchain(stack)
    assert model.invoke("Hello").content == stack.inference.text
    assert "".join(str(chunk.content) for chunk in model.stream("Hello")) == stack.inference.text
    assert asyncio.run(model.ainvoke("Hello")).content == stack.inference.text
    blocked = model.invoke(MARKER)
    assert blocked.response_metadata["finish_reason"] == "content_filter"
    stack.answer(words(30, 15, sentence=6))
    last = list(model.stream("Hello"))
    assert any(chunk.response_metadata.get("finish_reason") == "content_filter" for chunk in last)
    assert MARKER not in "".join(str(chunk.content) for chunk in last)


def test_langchain_tools(stack: Stack) -> None:
    stack.answer([""], calls=[CALL])
    model = langchain(stack).bind_tools([WEATHER])
    called = model.invoke("Hello")
    assert called.tool_calls[0]["args"] == {"place": "Oslo"}
    collected: Any = None
    for chunk in model.stream("Hello"):
        collected = chunk if collected is None else collected + chunk
    assert isinstance(collected, AIMessageChunk)
    assert collected.tool_calls[0]["args"] == {"place": "Oslo"}
    stack.answer([BLAND], calls=[])
    result = ToolMessage("sunny", tool_call_id=called.tool_calls[0]["id"])
    assert model.invoke([("user", "Hello"), called, result]).content == BLAND


# curl


def curl(stack: Stack, path: str, body: dict[str, Any]) -> str:
    command = ["curl", "-sN", "--max-time", "20", f"{stack.url}{path}", "-H", "content-type: application/json"]
    return subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True).stdout


def test_curl_reads_streams(stack: Stack) -> None:
    stack.answer(words(30, sentence=6))
    chat = curl(stack, "/v1/chat/completions", {"messages": ASKED, "stream": True})
    assert chat.endswith("data: [DONE]\n\n")
    assert chat.count("data: {") == 6
    assert curl(stack, "/v1/completions", {"prompt": "Hello", "stream": True}).count("data: {") == 6
    generation = curl(stack, "/generate_stream", {"inputs": "Hello"})
    assert generation.count("data: {") == 31
    assert '"finish_reason":"eos_token"' in generation
