"""One request to a peer, and what of the answer's text it let through."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from gateway.bench.script import MARKER, MODEL, Script

PROMPT = "Tell me in a few sentences what a river is."
DONE = b"data: [DONE]"
End = Literal["complete", "error event", "cut off", "still waiting"]


@dataclass(frozen=True)
class Target:
    """Where to ask a peer, with the headers and fields that it needs in every request."""

    url: str
    headers: Mapping[str, str]
    fields: Mapping[str, Any]

    def body(self, **fields: Any) -> bytes:
        """A chat request."""
        messages = [{"role": "user", "content": fields.pop("prompt", PROMPT)}]
        return json.dumps({"model": MODEL, "messages": messages, **self.fields, **fields}).encode()


@dataclass(frozen=True)
class Answer:
    """What a client got: ``status`` is None when no head came; ``raw`` is the body as far as it came."""

    status: int | None
    raw: bytes
    seconds: float
    first_byte_seconds: float | None
    end: End

    @property
    def text(self) -> str:
        """All text of the answer in order, whatever field it stands in."""
        return "".join(_texts(self.raw))

    def leaked(self, script: Script, *, prompt_is_unsafe: bool = False) -> int:
        """How many characters came that must not: of the marker and after it, or any if the prompt was unsafe."""
        full = script.text()
        allowed = 0 if prompt_is_unsafe else full.index(MARKER)
        came = _common_prefix(self.text, full)
        marker = len(MARKER) if MARKER.encode() in self.raw and not prompt_is_unsafe else 0
        return max(came - allowed, marker, 0)


async def ask(session: aiohttp.ClientSession, target: Target, patience: float, **fields: Any) -> Answer:
    """One chat request; given up after ``patience`` seconds."""
    began, status, first, raw = time.perf_counter(), None, None, bytearray()
    end: End = "cut off"
    try:
        async with asyncio.timeout(patience):
            async with session.post(target.url, data=target.body(**fields), headers=target.headers) as response:
                status = response.status
                async for piece in response.content.iter_any():
                    first = first or time.perf_counter() - began
                    raw += piece
                end = _end(bool(fields.get("stream")) and status == 200, bytes(raw))
    except TimeoutError:
        end = "still waiting"
    except (aiohttp.ClientError, OSError):
        pass
    return Answer(status, bytes(raw), time.perf_counter() - began, first, end)


def _end(streamed: bool, raw: bytes) -> End:
    if any(event.get("error") for event in _events(raw)):
        return "error event" if streamed else "complete"
    return "complete" if not streamed or DONE in raw else "cut off"


def _events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a body, whether it is one or a stream of events."""
    for line in raw.split(b"\n") if b"data:" in raw else [raw]:
        try:
            event = json.loads(line.strip().removeprefix(b"data:"))
        except ValueError:  # the end mark, a comment, or half an event
            continue
        if isinstance(event, dict):
            yield event


def _texts(raw: bytes) -> Iterator[str]:
    for event in _events(raw):
        for choice in event.get("choices") or []:
            message = choice.get("delta") or choice.get("message") or {}
            yield message.get("content") or ""
            yield message.get("reasoning_content") or ""
            for call in message.get("tool_calls") or []:
                yield (call.get("function") or {}).get("arguments") or ""


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
