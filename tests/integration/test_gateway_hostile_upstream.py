"""Services that are broken or in somebody else's hands: nothing of theirs leaves unchecked, and no answer is 503."""

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import httpx
import pytest

from tests.fakes.gateway_protocols import CHAT, COMPLETIONS, TGI, Speaker, by_name, openais, streamed_or_not
from tests.fakes.gateway_stack import Stack, chat_body, events, gateway
from tests.fakes.gateway_upstreams import BLAND, MARKER, FakeSafety, raw_server, serving


def put(*path: Any, value: Any) -> Callable[[Any], Any]:
    """Sets one value in whatever answers and events have its place."""

    def alter(said: Any) -> Any:
        said = part = deepcopy(said)
        for name in path[:-1]:
            part = part[name] if isinstance(part, list) else part.get(name)
            if not part:
                return said
        part[path[-1]] = value
        return said

    return alter


@by_name
@streamed_or_not
@pytest.mark.parametrize("fingerprint", [MARKER, "vllm-0.9", "g" * 64, "a" * 65, "", None, "ad" * 32, "fp_0123456789"])
def test_of_the_names_in_an_answer_only_a_hash_leaves(
    stack: Stack, speaker: Speaker, fingerprint: Any, stream: bool
) -> None:
    stack.answer([BLAND], usage=True, fingerprint=fingerprint)
    response = speaker.ask(stack, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    if speaker in (CHAT, COMPLETIONS):
        parts = events(response)[:-1] if stream else [response.json()]
        [(name, model, told)] = {(part["id"], part["model"], part["system_fingerprint"]) for part in parts}
        assert name.startswith(("chatcmpl-", "cmpl-"))
        assert model == "fake"
        assert told == (fingerprint if fingerprint in ("ad" * 32, "fp_0123456789") else None)


IN_BOTH: list[tuple[Speaker, tuple[str | int, ...]]] = [
    (CHAT, ("choices", 0, "logprobs", "content", 0, "logprob")),
    (CHAT, ("choices", 0, "logprobs", "content", 0, "top_logprobs", 1, "logprob")),
    (CHAT, ("choices", 0, "index")),
    (CHAT, ("usage", "total_tokens")),
    (COMPLETIONS, ("choices", 0, "logprobs", "token_logprobs", 0)),
    (COMPLETIONS, ("choices", 0, "logprobs", "top_logprobs", 0, "one")),
    (COMPLETIONS, ("choices", 0, "logprobs", "text_offset", 0)),
    (COMPLETIONS, ("usage", "completion_tokens")),
]
WHOLE: list[tuple[Speaker, tuple[str | int, ...]]] = [
    (TGI, ("details", "tokens", 0, "logprob")),
    (TGI, ("details", "tokens", 0, "id")),
    (TGI, ("details", "top_tokens", 0, 1, "logprob")),
    (TGI, ("details", "generated_tokens")),
]
STREAMED: list[tuple[Speaker, tuple[str | int, ...]]] = [
    (TGI, ("token", "logprob")),
    (TGI, ("token", "id")),
    (TGI, ("top_tokens", 0, "logprob")),
    (TGI, ("details", "seed")),
]
PLACES = [(*place, False) for place in IN_BOTH + WHOLE] + [(*place, True) for place in IN_BOTH + STREAMED]
NO_NUMBERS = {"nan": float("nan"), "-inf": float("-inf"), "inf": float("inf"), "huge": 10**400, "text": MARKER}


@pytest.mark.parametrize(("speaker", "path", "stream"), PLACES)
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_number_that_json_does_not_have_is_no_answer(
    stack: Stack, speaker: Speaker, path: tuple[str | int, ...], value: str, stream: bool
) -> None:
    stack.answer(["One ", "two."], alternatives=["a", "b"], usage=True, alter=put(*path, value=NO_NUMBERS[value]))
    assert_no_answer(speaker, speaker.ask(stack, stream=stream))


@pytest.mark.parametrize(
    "path", [("choices", 0, "index"), ("usage", "prompt_tokens"), ("usage", "total_tokens")], ids=str
)
@openais
@streamed_or_not
def test_number_below_nothing_is_no_answer(
    stack: Stack, speaker: Speaker, path: tuple[str | int, ...], stream: bool
) -> None:
    stack.answer(["One."], usage=True, alter=put(*path, value=-1))
    assert_no_answer(speaker, speaker.ask(stack, stream=stream))


@pytest.mark.parametrize("rows", [3, 1000])
def test_alternatives_without_a_token_are_no_answer(stack: Stack, rows: int) -> None:
    row = [{"id": 1, "text": MARKER, "logprob": -1.0}]
    stack.answer(["One ", "two."], alter=put("details", "top_tokens", value=[row] * rows))
    assert_no_answer(TGI, TGI.ask(stack))


@streamed_or_not
def test_text_in_the_place_of_a_calls_id_is_no_answer(stack: Stack, stream: bool) -> None:
    place = ("choices", 0, "delta" if stream else "message", "tool_calls", 0, "id")
    stack.answer(["Look. "], calls=[("find", ["{}"])], alter=put(*place, value=f"the {MARKER}"))
    assert_no_answer(CHAT, CHAT.ask(stack, stream=stream))


HALF = '{"q": "a\\ud800 river"}'


@streamed_or_not
def test_half_a_character_in_what_a_call_means(stack: Stack, stream: bool) -> None:
    stack.answer(["Look. "], calls=[("find", [HALF])])
    response = CHAT.ask(stack, stream=stream)
    assert response.status_code == 200
    assert json.dumps(HALF)[1:-1] in response.text
    asked = {"id": "1", "type": "function", "function": {"name": "find", "arguments": HALF}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [asked]}]
    assert CHAT.ask(stack, stream=stream, messages=messages).status_code == 200


def test_compressed_answer_is_not_unpacked() -> None:
    """A small body would become a huge one in memory."""
    text = b'{"choices": [{"message": {"content": "' + b"a" * 1000 + b'"}, "finish_reason": "stop"}]}'
    packed = gzip.compress(text)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    received: list[bytes] = []
    with (
        raw_server(head + packed, received=received) as inference_url,
        serving(FakeSafety()) as safety_url,
        gateway(inference_url, safety_url) as url,
    ):
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat_body())
    assert answer.status_code == 503
    assert b"accept-encoding: identity" in received[-1].lower()


@by_name
@streamed_or_not
@pytest.mark.parametrize("path", [("score",), ("categories", "S1")], ids=["score", "category"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf"), -0.01, 1.01, "none"])
def test_score_that_is_no_probability_is_no_verdict(
    stack: Stack, speaker: Speaker, path: tuple[str, ...], value: Any, stream: bool
) -> None:
    stack.safety.alter = put(*path, value=value)
    response = speaker.ask(stack, stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "safety: " in response.text
    assert BLAND.strip() not in response.text


def assert_no_answer(speaker: Speaker, response: httpx.Response) -> None:
    """It is 503, or a stream that ends with an error."""
    assert MARKER not in response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        error = events(response)[-1]
    else:
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        error = response.json()
    message = error["error"] if speaker is TGI else error["error"]["message"]
    assert message.startswith("inference: ")
