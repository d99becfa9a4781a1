"""OpenAI's chat completions: conversations in; choices out, each with content, reasoning and calls.

Source: OpenAI API reference (chat completions); ``reasoning`` and ``reasoning_content`` as vLLM and DeepSeek send them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from gateway.answers import (
    CONTENT,
    Call,
    Event,
    Finish,
    Head,
    Part,
    Sent,
    Token,
    Unit,
    checked_call_id,
    note_on,
    with_note,
)
from gateway.asked import (
    Asked,
    Kind,
    Turn,
    check_length,
    encode_body,
    given,
    has_words,
    last_prompt,
    resolve_model,
)
from gateway.protocols import openai_fields
from gateway.protocols.openai_fields import AnswerHead, headed, token_text
from gateway.protocols.parts import Count, UpstreamPart
from gateway.protocols.request_fields import choices_asked, other_fields
from gateway.settings import GatewaySettings
from services.contracts.chat import ChatMessage, ChatRequest, Json, Usage
from services.contracts.constitution import describe
from services.contracts.errors import RequestError

PATH = STREAM_PATH = "/v1/chat/completions"
ID_PREFIX = "chatcmpl-"
END = openai_fields.END
error = openai_fields.error

# Channels of text, in the order in which they are written.
_TEXTS = ("reasoning_content", "reasoning", CONTENT, "refusal")
_CALLS, _CALL = "tool_calls", "function_call"

# The fields of a message beside role and content that go upstream; their text is checked.
MESSAGE_FIELDS = ("name", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "refusal")
_KINDS = {"assistant": Kind.ANSWERED, "tool": Kind.GIVEN}


def read(raw: Json, settings: GatewaySettings, system_prompt: str | None = None) -> Asked:
    """Read the body of a chat request. Fields that the contract does not know go upstream, and their text is checked.

    Raises:
        RequestError: a field is malformed, or is one that this gateway cannot check; the error names it.
        UnknownModel: the model is not served here.
        PromptTooLong: the request has more text than ``prompt_limit_characters``.
    """
    fields = {name: value for name, value in raw.items() if value is not None}
    fields["model"] = resolve_model(fields.get("model"), settings)
    if isinstance(fields.get("messages"), list):
        if len(fields["messages"]) > settings.message_limit:
            raise RequestError(f"messages: at most {settings.message_limit} in one conversation", param="messages")
        fields["messages"] = [_plain_message(i, message) for i, message in enumerate(fields["messages"])]
    choices = choices_asked(fields)
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as invalid:
        param = ".".join(str(part) for part in invalid.errors()[0]["loc"])
        raise RequestError(describe(invalid), param=param) from invalid
    options, others = other_fields(fields, ("messages", "stream"))
    turns = tuple(_turn(message) for message in request.messages)
    prompt = last_prompt(turns)
    if not prompt:
        raise RequestError("messages: there are no words to answer", param="messages")
    if has_words(others.text):
        turns = (others, *turns)
    check_length(turns, "messages", settings)
    own = [{"role": "system", "content": system_prompt}] if system_prompt else []
    content = encode_body(options | {"messages": own + fields["messages"], "stream": request.stream})
    return Asked(request.model, turns, (prompt,), content, request.stream, choices, _answer_tokens(request))


def _answer_tokens(request: ChatRequest) -> int | None:
    return request.max_completion_tokens or request.max_tokens


def _turn(message: ChatMessage) -> Turn:
    """All text of a message as one turn."""
    kind, content = _KINDS.get(message.role, Kind.ASKED), message.content or ""
    others = given(*message.model_extra.values()).text if message.model_extra else ""
    return Turn(kind, "\n".join(text for text in (content, others) if text))


def _plain_message(index: int, message: Any) -> Any:
    """A message with one text and the known fields; what is no message at all is left for the schema to refuse."""
    if not isinstance(message, dict):
        return message
    plain = {"role": message.get("role"), "content": message.get("content")}
    for name, value in message.items():
        if name in MESSAGE_FIELDS and value:
            plain[name] = value
        elif name not in plain and value:
            place = f"messages.{index}.{name}"
            raise RequestError(f"{place}: not supported, since nothing can check it; leave it out", param=place)
    if isinstance(plain["content"], list):
        parts = enumerate(plain["content"])
        plain["content"] = "\n".join(_part_text(f"messages.{index}.content.{i}", part) for i, part in parts)
    return plain


def _part_text(place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    named = f"{kind} parts are" if isinstance(kind, str) and kind.isidentifier() else "only text parts are; this is"
    raise RequestError(f"{place}: {named} not supported, since nothing can check them; send text parts", param=place)


class _Function(UpstreamPart):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(UpstreamPart):
    index: Count | None = None
    id: str | None = None
    function: _Function


class _Said(UpstreamPart):
    """A message, or what an event adds to it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Candidate(UpstreamPart):
    token: str
    logprob: float
    bytes: list[int] | None = None

    def text(self) -> str:
        return token_text(self.token)

    def shape(self) -> Json:
        """As it leaves. The bytes only where they are the token's own: any others are text that nobody checked."""
        own = list(self.text().encode("utf-8", "surrogateescape"))
        return {"token": self.token, "logprob": self.logprob, "bytes": own if self.bytes == own else None}


class _Token(_Candidate):
    top_logprobs: tuple[_Candidate, ...] = ()

    def read(self) -> Token:
        shape = self.shape() | {"top_logprobs": [candidate.shape() for candidate in self.top_logprobs]}
        return Token(shape, (self.text(), *(candidate.text() for candidate in self.top_logprobs)))


class _Logprobs(UpstreamPart):
    content: list[_Token] | None = None


class _Choice(UpstreamPart):
    index: Count = 0
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls", "function_call"] | None = None
    logprobs: _Logprobs | None = None

    def parts(self) -> Iterator[Part]:
        said = self.message or self.delta or _Said()
        tokens = tuple(token.read() for token in (self.logprobs and self.logprobs.content) or ())
        for channel in _TEXTS:
            text = getattr(said, channel)
            if text or (tokens and channel == CONTENT):
                yield Part(self.index, channel, text or "", tokens if channel == CONTENT else ())
        for position, call in enumerate(said.tool_calls or ()):
            at = position if call.index is None else call.index
            yield Part.of_call(self.index, _CALLS, _call(call.function, at, call.id))
        if said.function_call:
            yield Part.of_call(self.index, _CALL, _call(said.function_call, None, None))


class _Answer(AnswerHead):
    """A whole answer, or one event of a stream."""

    choices: list[_Choice]


def _call(function: _Function, position: int | None, call_id: str | None) -> Call:
    return Call(position, checked_call_id(call_id or ""), function.name or "", function.arguments or "")


def read_whole(body: bytes | str, head: Head) -> Event:
    """A whole answer."""
    answer = _Answer.model_validate_json(body)
    parts = [part for choice in answer.choices for part in choice.parts()]
    finishes = {choice.index: Finish(choice.finish_reason) for choice in answer.choices if choice.finish_reason}
    return Event(head.by(answer.system_fingerprint), parts, finishes, answer.usage)


def read_event(data: str, head: Head) -> Event:
    """One event of a stream: it has the fields of a whole answer."""
    return read_whole(data, head)


def whole(asked: Asked, head: Head, units: list[Unit], usage: Usage) -> Json:
    """The body of a whole answer."""
    choices = []
    for unit in units:
        said = {channel: text for channel in _TEXTS if (text := unit.text(channel))}
        calls = _calls(unit.parts)
        message = {"role": "assistant", CONTENT: None if calls else ""} | said | calls
        choices.append(_choice(unit.index, "message", message, unit.tokens(), unit.finish))
    return headed(head, "chat.completion") | {"choices": choices, "usage": usage.model_dump()} | note_on(units)


def events(asked: Asked, head: Head, unit: Unit, sent: Sent) -> list[Json]:
    """The events for one unit of a stream; the first of a choice names the role, the last has nothing but its end."""
    role = {} if sent.started else {"role": "assistant"}
    if unit.blocked:  # what stands in its place and the end in one event, which no client can miss
        text = unit.text()
        delta = role | ({CONTENT: text} if text else {})
        return with_note([_event(head, unit.index, delta, (), unit.finish)], unit)
    written = []
    for part in unit.parts:
        delta = _calls((part,), streamed=True) if part.call else {part.channel: part.text}
        written.append(_event(head, unit.index, role | delta, part.tokens))
        role = {}
    if unit.finish:
        written.append(_event(head, unit.index, role, (), unit.finish))
    return with_note(written, unit)


def usage_events(head: Head, usage: Usage) -> list[Json]:
    """The event with the token counts, which OpenAI sends last."""
    return [headed(head, "chat.completion.chunk") | {"choices": [], "usage": usage.model_dump()}]


def _event(head: Head, index: int, delta: Json, tokens: Sequence[Token], finish: Finish | None = None) -> Json:
    return headed(head, "chat.completion.chunk") | {"choices": [_choice(index, "delta", delta, tokens, finish)]}


def _choice(index: int, name: str, said: Json, tokens: Sequence[Token], finish: Finish | None) -> Json:
    return {
        "index": index,
        name: said,
        "finish_reason": finish.reason if finish else None,
        "logprobs": {"content": [token.shape for token in tokens]} if tokens else None,
    }


def _calls(parts: tuple[Part, ...], *, streamed: bool = False) -> Json:
    """The calls among the parts, as a message or a delta has them."""
    written: Json = {}
    for call in (part.call for part in parts if part.call):
        function = {"name": call.name, "arguments": call.arguments}
        if call.position is None:
            written[_CALL] = function
        else:
            place = {"index": call.position} if streamed else {}
            written.setdefault(_CALLS, []).append(place | {"id": call.id, "type": "function", "function": function})
    return written
