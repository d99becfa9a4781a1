"""OpenAI's chat completion protocol: answers, and streams of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping

from services.contracts.chat import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChunkChoice,
    FinishReason,
    Json,
)
from services.contracts.errors import FedwardError
from services.inference.answers import Answer, Pieces
from services.inference.generation import Finish, Variant

_REASONS: dict[Finish, FinishReason] = {Finish.END: "stop", Finish.STOP: "stop", Finish.LENGTH: "length"}


def completion(pieces: Pieces, answer: Answer) -> ChatCompletion:
    """The body of a whole answer. ``model`` and ``system_fingerprint`` name the variant that wrote it."""
    message = ChatMessage(role="assistant", content=answer.text)
    variant = pieces.generation.variant
    return ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=variant.name,
        choices=[ChatChoice(message=message, finish_reason=_REASONS[answer.finish])],
        usage=pieces.usage(),
        system_fingerprint=variant.sha256,
    )


async def events(pieces: Pieces, request: ChatRequest) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer; an error on the way becomes an error event and ends the stream."""
    variant = pieces.generation.variant
    head = ChatChunk(
        id=_new_id(), created=int(time.time()), model=variant.name, choices=[], system_fingerprint=variant.sha256
    ).model_dump(exclude_none=True)
    yield _chunk(head, ChatDelta(role="assistant", content=""))
    try:
        async for piece in pieces:
            if piece.text:
                yield _chunk(head, ChatDelta(content=piece.text))
            if piece.finish:
                yield _chunk(head, ChatDelta(), _REASONS[piece.finish])
    except FedwardError as error:
        yield _event(error.body())
        return
    if _wants_usage(request):
        yield _event({**head, "usage": pieces.usage().model_dump()})
    yield "data: [DONE]\n\n"


def model_list(variants: Mapping[str, Variant], created: int) -> Json:
    """The body of ``/v1/models``: each name, with the name (``root``) and hash of the weights that answer."""
    cards = [
        {"id": name, "object": "model", "created": created, "owned_by": "fedward", "root": v.name, "sha256": v.sha256}
        for name, v in variants.items()
    ]
    return {"object": "list", "data": cards}


def _wants_usage(request: ChatRequest) -> bool:
    options = (request.model_extra or {}).get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _chunk(head: Json, delta: ChatDelta, finish: FinishReason | None = None) -> str:
    choice = ChunkChoice(delta=delta, finish_reason=finish)
    # An absent delta field says "nothing new", but finish_reason is always there: clients wait for it.
    content = {**choice.model_dump(exclude_none=True), "finish_reason": finish}
    return _event({**head, "choices": [content]})


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
