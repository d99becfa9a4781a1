"""What a client may ask: reading a chat request, and refusing what would pass the checks unseen."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from services.contracts.chat import ChatMessage, ChatRequest, Json
from services.contracts.constitution import describe
from services.contracts.errors import PromptTooLong, RequestError

# Fields that carry text to the model, or from it, past the checks of this version.
UNCHECKED_FIELDS = (
    *("tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "prompt_logprobs", "echo"),
    *("prediction", "documents", "chat_template", "chat_template_kwargs", "tool_prompt", "prompt", "suffix", "audio"),
    *("modalities", "response_format", "grammar", "structured_outputs", "web_search_options", "return_token_ids"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "best_of"),
)


@dataclass(frozen=True)
class Chat:
    """A request that may be served. ``content`` is the body that goes upstream: it holds the text that is checked."""

    model: str
    messages: tuple[ChatMessage, ...]
    other_text: str
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
    """Read the body of a chat request; unknown fields are kept and go upstream.

    Raises:
        RequestError: a field is malformed, or is one that this gateway does not check; the error names it.
        PromptTooLong: the conversation has more than ``prompt_limit`` characters.
    """
    fields = {name: value for name, value in raw.items() if value is not None}
    for name in UNCHECKED_FIELDS:
        if fields.get(name):
            raise RequestError(f"{name}: not supported, since its text would go unchecked; leave it out", param=name)
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
    unknown = {name: value for name, value in fields.items() if name not in ChatRequest.model_fields}
    other_text = "\n".join(_prose(unknown))
    total = sum(len(message.content or "") for message in messages) + len(other_text)
    if total > prompt_limit:
        raise PromptTooLong(f"messages: {total} characters; at most {prompt_limit} are accepted", param="messages")
    if not any(map(has_words, _asked(messages))):
        raise RequestError("messages: there are no words to answer", param="messages")
    body = {name: value for name, value in fields.items() if name != "n"}
    body |= {"messages": [message.model_dump() for message in messages], "stream": request.stream}
    try:
        content = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise RequestError("the body holds NaN, Infinity or half a surrogate pair; JSON has none of these") from error
    return Chat(request.model, messages, other_text, request.stream, content)


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


def _prose(value: Any) -> Iterator[str]:
    """Every string with a space in it, keys included: an unknown field might carry a prompt to the model."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and " " in item.strip():
            yield item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
