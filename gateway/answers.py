"""What a client gets: completions, chunks, and what stands in place of a blocked answer.

Everything that leaves is built here from named fields, so that a field which nobody checked (reasoning, tool calls,
log-probabilities) cannot slip through from upstream. The few names among them have to look like names.
"""

import re
import time
import uuid
from dataclasses import dataclass

from gateway.chat import Chat
from gateway.policy import Decision
from services.contracts.chat import ChatChunk, ChatCompletion, Json, Usage
from services.contracts.errors import ErrorDetail, UpstreamUnavailable

REFUSAL = "I'm sorry, but I can't help with that."
_NAME = re.compile(r"[A-Za-z0-9._:/@+-]{1,200}")


@dataclass(frozen=True)
class Head:
    """The fields that every part of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None

    @classmethod
    def of(cls, answer: ChatCompletion | ChatChunk) -> "Head":
        """As the inference service gave them; raises UpstreamUnavailable when it gave something else than names."""
        for name in (answer.id, answer.model, answer.system_fingerprint):
            if name and not _NAME.fullmatch(name):
                raise UpstreamUnavailable("inference", "sent text where the id or name of an answer should be")
        return cls(answer.id, answer.created, answer.model, answer.system_fingerprint)

    @classmethod
    def own(cls, chat: Chat) -> "Head":
        """For an answer that the inference service had no part in."""
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), chat.model, None)


def completion(head: Head, text: str, finish_reason: str, usage: Usage) -> Json:
    """A whole answer, as OpenAI shapes it."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
        "logprobs": None,
    }
    return _headed(head, "chat.completion") | {"choices": [choice], "usage": usage.model_dump()}


def blocked_completion(head: Head, decision: Decision, usage: Usage) -> Json:
    """The answer in place of one that is blocked: a normal 200 with OpenAI's ``content_filter``, marked as ours."""
    return completion(head, REFUSAL, "content_filter", usage) | {"fedward": _blocked(decision)}


def chunk(head: Head, text: str | None = None, *, first: bool = False, finish_reason: str | None = None) -> Json:
    """One event of a streamed answer; the first one names the role."""
    delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return _headed(head, "chat.completion.chunk") | {"choices": [choice]}


def blocked_chunk(head: Head, decision: Decision, *, first: bool) -> Json:
    """The event that ends a blocked stream.

    The error object stands inside ``fedward``: at the top level OpenAI's clients would raise it as a failure and
    their callers would never see ``finish_reason``.
    """
    error = ErrorDetail(message=decision.reason, type="content_filter", code="content_filter").model_dump()
    event = chunk(head, REFUSAL if first else None, first=first, finish_reason="content_filter")
    return event | {"fedward": _blocked(decision) | {"error": error}}


def usage_chunk(head: Head, usage: Usage) -> Json:
    """The event with the token counts, which OpenAI sends last."""
    return _headed(head, "chat.completion.chunk") | {"choices": [], "usage": usage.model_dump()}


def _headed(head: Head, kind: str) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _blocked(decision: Decision) -> Json:
    return {
        "blocked": True,
        "direction": decision.direction.value,
        "categories": list(decision.categories),
        "reason": decision.reason,
    }
