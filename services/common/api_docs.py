"""What the services' OpenAPI documents say of answers beyond what FastAPI finds by itself: errors and streams."""

from typing import Any

from pydantic import BaseModel

from services.contracts.errors import ErrorBody

Responses = dict[int | str, dict[str, Any]]
_MEANINGS = {
    400: "The request is malformed, or cannot be served as asked; `param` names the field.",
    401: "There is no valid API key or token; `WWW-Authenticate` says what is wanted.",
    404: "There is no model of this name.",
    409: "An adapter does not have the promised sha256.",
    413: "The request body is over the limit.",
    422: "The request is malformed, or cannot be served as asked.",
    424: "The generation failed.",
    429: "A queue is full or a limit is used up; `Retry-After` says when to try again.",
    503: "A service behind this one failed or is too slow; `Retry-After` says when to try again.",
}


def error_responses(*statuses: int, body: type[BaseModel] = ErrorBody) -> Responses:
    """The error answers of routes: ``statuses`` with their meanings, and all others in the same shape.

    That others are named keeps FastAPI from adding its own 422, which no service sends.
    """
    named: Responses = {status: {"model": body, "description": _MEANINGS[status]} for status in statuses}
    others = {"4XX": "The request cannot be served.", "5XX": "The service failed."}
    return named | {status: {"model": body, "description": meaning} for status, meaning in others.items()}


# One server-sent event; of its fields only ``data`` is used.
_EVENTS = {"schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}}
STREAM: Responses = {200: {"content": {"text/event-stream": _EVENTS}, "description": "Server-sent events."}}


def whole_or_stream(whole: Any) -> Responses:
    """The answer of a route that streams on request; ``whole`` is what it answers otherwise."""
    return {200: STREAM[200] | {"model": whole, "description": "The whole answer, or server-sent events."}}
