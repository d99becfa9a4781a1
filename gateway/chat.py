"""What a client may ask: reading a chat request, and refusing what would pass the checks unseen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from services.contracts.chat import ChatMessage, ChatRequest, Json
from services.contracts.constitution import describe
from services.contracts.errors import PromptTooLong, RequestError

# Numbers and switches that ask for text beside the answer, which would go unchecked.
UNCHECKED_FIELDS = ("logprobs", "top_logprobs", "prompt_logprobs", "echo", "best_of", "return_token_ids")
# What OpenAI's clients may send along for OpenAI's own bookkeeping; it says nothing to the model and is left out.
IGNORED_FIELDS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Chat:
    """A request that may be served. ``content`` is the body that goes upstream: it holds the text that is checked."""

    model: str
    messages: tuple[ChatMessage, ...]
    stream: bool
    content: bytes

    @property
    def prompt(self) -> str:
        """The last text with words that did not come from the assistant: what the answer answers."""
        return next(text for text in reversed(_asked(self.messages)) if has_words(text))


def has_words(text: str) -> bool:
    """There is a letter or a digit of any script; on other texts a classifier has no verdict."""
    return any(character.isalnum() for character in text)


def read_chat(raw: Json, *, message_limit: int, prompt_limit: int) -> Chat:
    """Read the body of a chat request. Of the fields that the contract does not know, numbers and switches go upstream.

    Raises:
        RequestError: a field is malformed, or is one that this gateway does not check; the error names it.
        PromptTooLong: the conversation has more than ``prompt_limit`` characters.
    """
    fields = {name: value for name, value in raw.items() if value is not None}
    if isinstance(fields.get("messages"), list):
        if len(fields["messages"]) > message_limit:
            raise RequestError(f"messages: at most {message_limit} in one conversation", param="messages")
        fields["messages"] = [_plain_message(i, message) for i, message in enumerate(fields["messages"])]
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        param = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise RequestError(describe(error), param=param) from error
    if request.n != 1:
        raise RequestError("n: only one answer a request is supported; leave it out or send 1", param="n")
    return _bounded(request, fields, prompt_limit)


def _bounded(request: ChatRequest, fields: Json, prompt_limit: int) -> Chat:
    messages = tuple(ChatMessage(role=message.role, content=message.content or "") for message in request.messages)
    total = sum(len(message.content or "") for message in messages)
    if total > prompt_limit:
        raise PromptTooLong(f"messages: {total} characters; at most {prompt_limit} are accepted", param="messages")
    if not any(map(has_words, _asked(messages))):
        raise RequestError("messages: there are no words to answer", param="messages")
    body = {name: value for name, value in fields.items() if name in ChatRequest.model_fields and name != "n"}
    body |= _options(fields)
    body |= {"messages": [message.model_dump() for message in messages], "stream": request.stream}
    try:
        content = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise RequestError("the body holds NaN, Infinity or half a surrogate pair; JSON has none of these") from error
    return Chat(request.model, messages, request.stream, content)


def _options(fields: Json) -> Json:
    """The fields beside the contract's that go upstream: no text is among them, whatever a server makes of a field.

    Raises:
        RequestError: a field holds text or a structure, or asks for output beside the answer.
    """
    options: Json = {}
    for name, value in fields.items():
        if name in ChatRequest.model_fields or name in IGNORED_FIELDS:
            continue
        if name == "stream_options" and isinstance(value, dict):
            options[name] = {"include_usage": value.get("include_usage") is True}
        elif isinstance(value, bool | int | float) and name not in UNCHECKED_FIELDS:
            options[name] = value
        elif value:
            raise RequestError(f"{name}: not supported, since its text would go unchecked; leave it out", param=name)
    return options


def _asked(messages: Sequence[ChatMessage]) -> list[str]:
    return [message.content or "" for message in messages if message.role != "assistant"]


def _plain_message(index: int, message: Any) -> Any:
    """A message as role and one text; what is no message at all is left for the schema to refuse."""
    if not isinstance(message, dict):
        return message
    for name, value in message.items():
        if name not in ("role", "content") and value:
            place = f"messages.{index}.{name}"
            raise RequestError(f"{place}: not supported; a message has only role and content here", param=place)
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(f"messages.{index}.content.{i}", part) for i, part in enumerate(content))
    return {"role": message.get("role"), "content": content}


def _part_text(place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(f"{place}: only text parts are supported; nothing else can be checked", param=place)
