"""OpenAI's text completions: a prompt, or several, continued as they stand; ``echo`` and ``logprobs`` included.

Source: OpenAI API reference (completions), and how lm-evaluation-harness reads it.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from gateway.answers import CONTENT, Event, Finish, Head, Part, Sent, Token, Unit, note_on, with_note
from gateway.asked import Asked, Kind, Turn, check_length, encode_body, has_words, resolve_model
from gateway.protocols import openai_fields
from gateway.protocols.openai_fields import AnswerHead, headed, token_text
from gateway.protocols.parts import Count, UpstreamPart
from gateway.protocols.request_fields import choices_asked, other_fields
from gateway.settings import GatewaySettings
from services.contracts.chat import Json, TokenCount, Usage
from services.contracts.errors import RequestError

PATH = STREAM_PATH = "/v1/completions"
ID_PREFIX = "cmpl-"
END = openai_fields.END
error = openai_fields.error
_TOKENS = TypeAdapter(TokenCount | None)


def read(raw: Json, settings: GatewaySettings, system_prompt: str | None = None) -> Asked:
    """Read the body of a completion request. A raw prompt has no place for a system prompt.

    Raises:
        RequestError: a field is malformed, or is one that this gateway cannot check; the error names it.
        UnknownModel: the model is not served here.
        PromptTooLong: the request has more text than ``prompt_limit_characters``.
    """
    fields = {name: value for name, value in raw.items() if value is not None}
    model = resolve_model(fields.get("model"), settings)
    prompts = _prompts(fields.get("prompt"), settings)
    stream = fields.get("stream", False)
    if not isinstance(stream, bool):
        raise RequestError("stream: has to be true or false", param="stream")
    options, others = other_fields(fields, ("model", "prompt", "stream"))
    turns = tuple(Turn(Kind.ASKED, prompt) for prompt in prompts)
    if has_words(others.text):
        turns = (others, *turns)
    check_length(turns, "prompt", settings)
    body = options | {"model": model, "prompt": fields["prompt"], "stream": stream}
    choices = choices_asked(fields) * len(prompts)
    return Asked(model, turns, prompts, encode_body(body), stream, choices, _answer_tokens(fields))


def _answer_tokens(fields: Json) -> int | None:
    try:
        return _TOKENS.validate_python(fields.get("max_tokens")) or None
    except ValidationError as error:
        raise RequestError("max_tokens: has to be a number of tokens", param="max_tokens") from error


def _prompts(prompt: object, settings: GatewaySettings) -> tuple[str, ...]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError("prompt: has to be a text or a list of texts; token ids cannot be checked", param="prompt")
    if len(prompts) > settings.message_limit:
        raise RequestError(f"prompt: at most {settings.message_limit} in one request", param="prompt")
    if not all(map(has_words, prompts)):
        raise RequestError("prompt: there are no words to continue", param="prompt")
    return tuple(prompts)


class _Logprobs(UpstreamPart):
    """A column for each thing that is told about the tokens."""

    tokens: tuple[str, ...] = ()
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[Count] | None = None

    def rows(self) -> Iterator[Token]:
        columns = (self.token_logprobs or (), self.top_logprobs or (), self.text_offset or ())
        for token, logprob, top, offset in zip_longest(self.tokens, *columns):
            shape = {"tokens": token or "", "token_logprobs": logprob, "top_logprobs": top, "text_offset": offset}
            yield Token(shape, tuple(token_text(name) for name in (token or "", *(top or ()))))


class _Choice(UpstreamPart):
    index: Count = 0
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class _Answer(AnswerHead):
    """A whole answer, or one event of a stream."""

    choices: list[_Choice]


def read_whole(body: bytes | str, head: Head) -> Event:
    """A whole answer."""
    answer = _Answer.model_validate_json(body)
    parts = []
    for choice in answer.choices:
        tokens = tuple(choice.logprobs.rows()) if choice.logprobs else ()
        if choice.text or tokens:
            parts.append(Part(choice.index, CONTENT, choice.text, tokens))
    finishes = {choice.index: Finish(choice.finish_reason) for choice in answer.choices if choice.finish_reason}
    return Event(head.by(answer.system_fingerprint), parts, finishes, answer.usage)


def read_event(data: str, head: Head) -> Event:
    """One event of a stream: it has the fields of a whole answer."""
    return read_whole(data, head)


def whole(asked: Asked, head: Head, units: list[Unit], usage: Usage) -> Json:
    """The body of a whole answer."""
    choices = [_choice(unit.index, unit.text(), unit.tokens(), unit.finish) for unit in units]
    return headed(head, "text_completion") | {"choices": choices, "usage": usage.model_dump()} | note_on(units)


def events(asked: Asked, head: Head, unit: Unit, sent: Sent) -> list[Json]:
    """The event for one unit of a stream."""
    event = headed(head, "text_completion")
    event["choices"] = [_choice(unit.index, unit.text(), unit.tokens(), unit.finish)]
    return with_note([event], unit)


def usage_events(head: Head, usage: Usage) -> list[Json]:
    """The event with the token counts."""
    return [headed(head, "text_completion") | {"choices": [], "usage": usage.model_dump()}]


def _choice(index: int, text: str, tokens: Sequence[Token], finish: Finish | None) -> Json:
    columns = {name: [token.shape[name] for token in tokens] for name in _Logprobs.model_fields} if tokens else None
    return {
        "index": index,
        "text": text,
        "logprobs": columns,
        "finish_reason": finish.reason if finish else None,
    }
