"""The bodies that the mock services answer with, in the shape that each peer expects."""

import json
from collections.abc import Iterator
from typing import Any

from gateway.bench.script import MARKER, MODEL, Field, Script

LITELLM_CHECK = b"/beta/litellm_basic_guardrail_api"
WEBHOOK = b"/webhook"
_MARKER = MARKER.encode()
_HEAD = {"id": "chatcmpl-bench", "created": 1, "model": MODEL}
_DONE = b"data: [DONE]\n\n"


def get(url: bytes) -> bytes:
    """The answer to any GET: readiness, and the list of models."""
    if url.endswith(b"/models"):
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": MODEL}
        return json.dumps({"object": "list", "data": [model]}).encode()
    return b'{"status": "ready"}'


def verdict(url: bytes, body: bytes) -> bytes:
    """Unsafe if and only if the marker occurs in what is to be checked."""
    if url == LITELLM_CHECK:
        action = {"action": "BLOCKED", "blocked_reason": "unsafe"} if _MARKER in body else {"action": "NONE"}
        return json.dumps(action).encode()
    if url == WEBHOOK:
        return json.dumps({"verdict": _MARKER not in body}).encode()
    return json.dumps({"verdicts": [_verdict(item) for item in json.loads(body)["items"]]}).encode()


def _verdict(item: Any) -> dict[str, Any]:
    unsafe = MARKER in json.dumps(item)
    return {
        "outcome": "unsafe" if unsafe else "safe",
        "score": 0.9 if unsafe else 0.1,
        "threshold": 0.5,
        "categories": {"S1": 0.9} if unsafe else {},
        "model_id": MODEL,
    }


def whole(script: Script) -> bytes:
    """The whole answer as a chat completion."""
    fields: dict[Field, str] = {"content": ""}
    for field, text in script.pieces():
        fields[field] = fields.get(field, "") + text
    message: dict[str, Any] = {"role": "assistant"}
    for field, text in fields.items():
        message |= _delta(field, text)
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": script.words, "total_tokens": script.words + 9}
    return json.dumps(_HEAD | {"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def events(script: Script) -> Iterator[bytes]:
    """The streamed answer: a role, one event per piece, the finish, and the end mark in one piece with it."""
    yield _event({"role": "assistant", "content": ""})
    for field, text in script.pieces():
        yield _event(_delta(field, text))
    yield _event({}, "stop") + _DONE


def _delta(field: Field, text: str) -> dict[str, Any]:
    if field != "tool_calls":
        return {field: text}
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "note", "arguments": text}}
    return {field: [call]}


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %s\n\n" % json.dumps(_HEAD | {"object": "chat.completion.chunk", "choices": [choice]}).encode()
