"""What OpenAI's clients may send beyond the contract: nulls, texts in parts, and the wish for log-probabilities."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.contracts.chat import ChatRequest, CompletionRequest
from services.contracts.errors import RequestError
from services.inference.unsupported import refuse_unsupported


def _without_nulls(values: Any) -> Any:
    """Clients send null for what they leave out."""
    return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


class ChatBody(ChatRequest):
    """Body of ``POST /v1/chat/completions``. The text parts of a message are joined by line ends, as in the gateway."""

    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    _nulls = model_validator(mode="before")(_without_nulls)

    @field_validator("messages", mode="before")
    @classmethod
    def _join_parts(cls, messages: Any) -> Any:
        return [_joined(i, message) for i, message in enumerate(messages)] if isinstance(messages, list) else messages

    def refuse_ignored(self) -> None:
        """Raise RequestError for what would be ignored: other fields, and values that make no sense together."""
        _refuse_n(self.n)
        refuse_unsupported(self.model_extra)
        for i, message in enumerate(self.messages):
            refuse_unsupported(message.model_extra, f"messages.{i}.")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")


class CompletionBody(CompletionRequest):
    """Body of ``POST /v1/completions``."""

    _nulls = model_validator(mode="before")(_without_nulls)

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one for each answer, however the caller gave them: texts, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]

    def refuse_ignored(self) -> None:
        """Raise RequestError for what would be ignored: other fields, and values that make no sense together."""
        _refuse_n(self.n)
        refuse_unsupported(self.model_extra)
        if not self.max_tokens and not self.echo:
            raise RequestError(
                "max_tokens is 0, so nothing is written; set echo to score the prompt", param="max_tokens"
            )
        if self.stream and len(self.prompts()) > 1:
            raise RequestError("stream takes one prompt; send a request for each", param="prompt")


def wants_usage(body: ChatBody | CompletionBody) -> bool:
    """Whether a stream ends with the usage counts."""
    options = (body.model_extra or {}).get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _refuse_n(n: int) -> None:
    if n > 1:
        raise RequestError(f"n is {n}, but one answer per prompt is generated; send {n} requests", param="n")


def _joined(index: int, message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(_part_text(index, place, part) for place, part in enumerate(content))}


def _part_text(index: int, place: int, part: Any) -> str:
    fields = part if isinstance(part, dict) else {}
    kind, text = fields.get("type"), fields.get("text")
    if kind != "text" or not isinstance(text, str):
        raise PydanticCustomError(
            "not_text",
            "part {place} of message {index} is no text; only texts are read",
            {"place": place, "index": index},
        )
    return text
