"""OpenAI's chat completion protocol: answers, and streams of server-sent events."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

from services.contracts.chat import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatMessage, FinishReason, Json
from services.contracts.errors import FedwardError
from services.inference.answers import Answer, Pieces
from services.inference.events import DONE, event
from services.inference.generation import Finish, Piece, Variant
from services.inference.openai_requests import ChatBody, wants_usage
from services.inference.vocabulary import Vocabulary, finite

REASONS: dict[Finish, FinishReason] = {Finish.END: "stop", Finish.STOP: "stop", Finish.LENGTH: "length"}


def completion(pieces: Pieces, answer: Answer, body: ChatBody, vocabulary: Vocabulary) -> Json:
    """The body of a whole answer. ``model`` and ``system_fingerprint`` name the variant that wrote it."""
    message = ChatMessage(role="assistant", content=answer.text)
    variant = pieces.generation.variant
    content = ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=variant.name,
        choices=[ChatChoice(message=message, finish_reason=REASONS[answer.finish])],
        usage=pieces.usage(),
        system_fingerprint=variant.sha256,
    ).model_dump(exclude_none=True)
    if body.logprobs:
        content["choices"][0]["logprobs"] = _logprobs(answer.pieces, vocabulary)
    return content


async def events(pieces: Pieces, body: ChatBody, vocabulary: Vocabulary) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer; an error on the way becomes an error event and ends the stream."""
    variant = pieces.generation.variant
    head = ChatChunk(
        id=_new_id(), created=int(time.time()), model=variant.name, choices=[], system_fingerprint=variant.sha256
    ).model_dump(exclude_none=True)
    yield _chunk(head, ChatDelta(role="assistant", content=""))
    try:
        async for piece in pieces:
            logprobs = _logprobs([piece], vocabulary) if body.logprobs else None
            if piece.text or (logprobs and logprobs["content"]):
                yield _chunk(head, ChatDelta(content=piece.text), logprobs=logprobs)
            if piece.finish:
                yield _chunk(head, ChatDelta(), REASONS[piece.finish])
    except FedwardError as error:
        yield event(error.body())
        return
    if wants_usage(body):
        yield event({**head, "usage": pieces.usage().model_dump()})
    yield DONE


def model_card(name: str, variant: Variant, created: int) -> Json:
    """A name that can be asked for, with the name (``root``) and hash of the weights that answer."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "fedward",
        "root": variant.name, "sha256": variant.sha256,
    }  # fmt: skip


def model_list(variants: Mapping[str, Variant], created: int) -> Json:
    """The body of ``/v1/models``."""
    return {"object": "list", "data": [model_card(name, variant, created) for name, variant in variants.items()]}


def _logprobs(pieces: Sequence[Piece], vocabulary: Vocabulary) -> Json:
    """The tokens' log-probabilities; an end token is no part of the content."""
    return {
        "content": [
            {
                **_token(piece.score.token_id, piece.score.logprob, vocabulary),
                "top_logprobs": [_token(token_id, logprob, vocabulary) for token_id, logprob in piece.score.top],
            }
            for piece in pieces
            if not piece.special
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float, vocabulary: Vocabulary) -> Json:
    return {"token": vocabulary.name(token_id), "logprob": finite(logprob), "bytes": vocabulary.content(token_id)}


def _chunk(head: Json, delta: ChatDelta, finish: FinishReason | None = None, logprobs: Json | None = None) -> str:
    # An absent delta field says "nothing new", but finish_reason is always there: clients wait for it.
    choice = {"index": 0, "delta": delta.model_dump(exclude_none=True), "finish_reason": finish}
    if logprobs is not None:
        choice["logprobs"] = logprobs
    return event({**head, "choices": [choice]})


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
