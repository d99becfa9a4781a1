"""text-generation-inference's own protocol: answers, token streams, ``/info`` and error bodies.

Source: TGI 3.3 ``docs/openapi.json``. One difference is on purpose: a stream that cannot begin answers with its
HTTP status (422, 429) instead of 200 with an error event; clients read both.
"""

import json
from collections.abc import AsyncIterator

from services.contracts.chat import GenerateRequest, Json, TgiError
from services.contracts.errors import BodyTooLarge, FedwardError, Overloaded, RequestError
from services.inference.answers import Answer, Pieces
from services.inference.generation import Finish, Piece
from services.inference.service import MAX_STOPS, InferenceService

_REASONS = {Finish.END: "eos_token", Finish.STOP: "stop_sequence", Finish.LENGTH: "length"}


def answer_body(pieces: Pieces, answer: Answer, request: GenerateRequest) -> Json:
    """The body of ``/generate``; tokens and counts are in it when the request asks for ``details``."""
    body: Json = {"generated_text": _full_text(request, answer.text)}
    if request.parameters.details:
        tokens = [_token(piece) for piece in answer.pieces]
        body["details"] = {**_details(pieces, answer.finish), "prefill": [], "tokens": tokens}
    return body


def answer_headers(pieces: Pieces, seconds: float) -> dict[str, str]:
    """TGI's headers about the work done."""
    usage = pieces.usage()
    return {
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.completion_tokens),
        "x-total-time": str(int(seconds * 1000)),
    }


async def events(pieces: Pieces, request: GenerateRequest) -> AsyncIterator[str]:
    """One event for each token; the last one has the whole text and the details."""
    text = ""
    try:
        index = 0
        async for piece in pieces:
            index += 1
            text += piece.text
            event: Json = {"index": index, "token": _token(piece), "generated_text": None, "details": None}
            if piece.finish:
                details = {**_details(pieces, piece.finish), "input_length": pieces.usage().prompt_tokens}
                event |= {"generated_text": _full_text(request, text), "details": details}
            yield _event(event)
    except FedwardError as error:
        yield _event(error_body(error)[1])


def error_body(error: FedwardError) -> tuple[int, Json]:
    """HTTP status and body in TGI's terms."""
    status, kind = 424, "generation"
    if isinstance(error, RequestError):
        status, kind = 413 if isinstance(error, BodyTooLarge) else 422, "validation"
    elif isinstance(error, Overloaded):
        status, kind = 429, "overloaded"
    return status, TgiError(error=error.message, error_type=kind).model_dump()


def info(service: InferenceService, version: str) -> Json:
    """The body of ``/info``."""
    base, settings = service.base, service.settings
    return {
        "model_id": base.model_id,
        "model_sha": base.sha256,
        "model_dtype": str(base.network.dtype).removeprefix("torch."),
        "model_device_type": base.network.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_batch + settings.max_waiting,
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOPS,
        "max_input_tokens": base.context_tokens - 1,
        "max_total_tokens": base.context_tokens,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "fedward-inference",
        "version": version,
    }


def _full_text(request: GenerateRequest, text: str) -> str:
    return request.inputs + text if request.parameters.return_full_text else text


def _details(pieces: Pieces, finish: Finish) -> Json:
    sampler = pieces.generation.sampler
    return {
        "finish_reason": _REASONS[finish],
        "generated_tokens": pieces.generation.generated,
        "seed": sampler.seed if sampler else None,
    }


def _token(piece: Piece) -> Json:
    score = piece.score
    return {"id": score.token_id, "text": piece.text, "logprob": score.logprob, "special": piece.special}


def _event(content: Json) -> str:
    return f"data:{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
