"""text-generation-inference's own protocol: a raw prompt continued, token by token in a stream; its error bodies.

Source: TGI 3.3 ``docs/openapi.json``. Two things TGI has no word for:

- A blocked answer ends with ``finish_reason`` ``content_filter``; Hugging Face's clients hand it to their caller. In
  a stream it is the last event, as usual with the whole text that has left, and with the note ``fedward`` beside it.
  (``error`` at the top level would make these clients raise, and what was sent would be lost.)
- A failure of a service is 503 with ``Retry-After`` and ``error_type`` ``generation``; TGI's 424 names no retry.
"""

from itertools import zip_longest
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from gateway.answers import CONTENT, REVISED, Event, Finish, Head, Part, Sent, Token, Unit, note_on, with_note
from gateway.asked import Asked, Kind, Turn, check_length, encode_body, has_words, resolve_model
from gateway.protocols.parts import Count, UpstreamPart
from gateway.protocols.request_fields import other_fields
from gateway.settings import GatewaySettings
from gateway.upstreams import status_of
from services.contracts.chat import GenerateRequest, Json, TgiError, Usage
from services.contracts.constitution import describe
from services.contracts.errors import FedwardError, RequestError

PATH, STREAM_PATH = "/generate", "/generate_stream"
ID_PREFIX = ""
END = ""


def read(raw: Json, settings: GatewaySettings, system_prompt: str | None = None) -> Asked:
    """Read the body of a request; ``stream`` counts on the route that looks at it. There is no system prompt here.

    Raises:
        RequestError: a field is malformed, or is one that this gateway cannot check; the error names it.
        UnknownModel: the adapter is not served here.
        PromptTooLong: there is more text than ``prompt_limit_characters``.
    """
    try:
        request = GenerateRequest.model_validate({name: value for name, value in raw.items() if value is not None})
    except ValidationError as invalid:
        param = ".".join(str(part) for part in invalid.errors()[0]["loc"])
        raise RequestError(describe(invalid), param=param) from invalid
    if not has_words(request.inputs):
        raise RequestError("inputs: there are no words to continue", param="inputs")
    wanted = request.parameters
    parameters = wanted.model_dump(exclude_unset=True, exclude_none=True)
    model = resolve_model(parameters.pop("adapter_id", None), settings, param="parameters.adapter_id")
    options, others = other_fields(parameters, (), place="parameters.")
    if model != settings.served_model_name:
        options["adapter_id"] = model
    turns: tuple[Turn, ...] = (Turn(Kind.ASKED, request.inputs),)
    if has_words(others.text):
        turns = (others, *turns)
    check_length(turns, "inputs", settings)
    body = {"inputs": request.inputs, "parameters": options}
    echoed = request.inputs if wanted.return_full_text else ""
    return Asked(
        model,
        turns,
        (request.inputs,),
        encode_body(body),
        request.stream,
        answer_tokens=wanted.max_new_tokens,
        echoed=echoed,
        details=wanted.details,
    )


class _Candidate(UpstreamPart):
    id: Count
    text: str
    logprob: float
    special: bool = False


class _Facts(UpstreamPart):
    """How a generation ended."""

    finish_reason: Literal["length", "eos_token", "stop_sequence", "content_filter"]
    generated_tokens: Count = 0
    input_length: Count | None = None
    seed: Count | None = None

    def finish(self) -> Finish:
        return Finish(self.finish_reason, self.model_dump(include={"generated_tokens", "input_length", "seed"}))


class _Details(_Facts):
    tokens: tuple[_Candidate, ...] = ()
    top_tokens: list[list[_Candidate]] | None = None

    @model_validator(mode="after")
    def _each_row_has_its_token(self) -> Self:
        if len(self.top_tokens or ()) > len(self.tokens):
            raise ValueError("more rows of alternatives than tokens")
        return self


class _Answer(UpstreamPart):
    generated_text: str
    details: _Details | None = None


class _Event(UpstreamPart):
    token: _Candidate
    top_tokens: list[_Candidate] | None = None
    details: _Facts | None = None


def _token(token: _Candidate, top: list[_Candidate] | None) -> Token:
    shape: Json = {"token": token.model_dump()}
    if top is not None:
        shape["top_tokens"] = [candidate.model_dump() for candidate in top]
    return Token(shape, (token.text, *(candidate.text for candidate in top or ())))


def read_whole(body: bytes, head: Head) -> Event:
    """A whole answer. Without ``details`` it does not say how it ended, and neither do we."""
    answer = _Answer.model_validate_json(body)
    details = answer.details
    if details is None:
        return Event(head, [Part(0, CONTENT, answer.generated_text)], {0: Finish("")})
    tokens = tuple(_token(*row) for row in zip_longest(details.tokens, details.top_tokens or ()))
    return Event(head, [Part(0, CONTENT, answer.generated_text, tokens)], {0: details.finish()})


def read_event(data: str, head: Head) -> Event:
    """One event of a stream: a token, and at the end how the generation ended."""
    event = _Event.model_validate_json(data)
    text = "" if event.token.special else event.token.text
    part = Part(0, CONTENT, text, (_token(event.token, event.top_tokens),))
    return Event(head, [part], {0: event.details.finish()} if event.details else {})


def whole(asked: Asked, head: Head, units: list[Unit], usage: Usage) -> Json:
    """The body of a whole answer."""
    unit = units[0]
    body: Json = {"generated_text": unit.text()}
    if asked.details:
        body["details"] = _facts(unit, 0) | {"prefill": [], "tokens": [token.shape["token"] for token in unit.tokens()]}
        tops = [token.shape["top_tokens"] for token in unit.tokens() if "top_tokens" in token.shape]
        body["details"] |= {"top_tokens": tops} if tops else {}
    return body | note_on(units)


def events(asked: Asked, head: Head, unit: Unit, sent: Sent) -> list[Json]:
    """One event for each token; the last one of the answer has the whole text and how it ended."""
    tokens = [token.shape for token in unit.tokens()]
    if not tokens and (unit.finish or unit.changed or sent.repaired):  # text of which no token is told
        text = unit.text()
        tokens = [{"token": {"id": 0, "text": text, "logprob": 0.0, "special": not text}}]
    written: list[Json] = [
        {"index": sent.tokens + i} | token | {"generated_text": None, "details": None}
        for i, token in enumerate(tokens, start=1)
    ]
    if unit.finish:
        text = asked.echoed + sent.texts[CONTENT] + unit.text()
        written[-1] |= {"generated_text": text, "details": {"input_length": 0} | _facts(unit, sent.tokens)}
    return with_note(written, unit)


def usage_events(head: Head, usage: Usage) -> list[Json]:
    """None: the counts stand in ``details``."""
    return []


def error(problem: FedwardError) -> tuple[int, Json]:
    """HTTP status and body in TGI's terms."""
    status, message = status_of(problem), problem.body()["error"]["message"]
    if isinstance(problem, RequestError) and status in (400, 404):
        status = 422
    kind = "overloaded" if status == 429 else "validation" if status < 500 else "generation"
    return status, TgiError(error=message, error_type=kind).model_dump()


def _facts(unit: Unit, tokens_before: int) -> Json:
    """How a generation ended; of one that was stopped, only how many tokens have left is known."""
    assert unit.finish is not None
    facts = unit.finish.facts or {"generated_tokens": tokens_before + len(unit.tokens()), "seed": None}
    known = {name: value for name, value in facts.items() if value is not None or name == "seed"}
    reason = "eos_token" if unit.finish.reason == REVISED else unit.finish.reason
    return {"finish_reason": reason} | known
