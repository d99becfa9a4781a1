"""What the OpenAPI document says of request bodies: the fields that are read, while all others are accepted too.

The routes take any JSON object, so that a protocol's own reader can refuse it in the protocol's words (``protocols``).
"""

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from services.contracts.chat import ChatMessage, ChatRequest, CompletionRequest, GenerateRequest, Json


class MessageBody(ChatMessage):
    """One turn of a conversation; its text may come in parts."""

    content: str | list[Json] | None = None  # type: ignore[assignment]  # wider than what our own services write


class ChatBody(ChatRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[MessageBody]  # type: ignore[assignment]


class ModerationBody(BaseModel):
    """Body of ``POST /v1/moderations``."""

    model_config = ConfigDict(extra="allow")

    input: str | list[str]
    model: str | None = None


BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionRequest,
    "/v1/moderations": ModerationBody,
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/": GenerateRequest,
}


def name_bodies(document: Json) -> Json:
    """Put the schemas of the bodies into an OpenAPI document."""
    models = dict.fromkeys(BODIES.values())
    references, found = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    document["components"]["schemas"] |= found["$defs"]
    for path, model in BODIES.items():
        body = document["paths"][path]["post"]["requestBody"]
        body["content"]["application/json"]["schema"] = references[model, "validation"]
    return document
