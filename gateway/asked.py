"""What is asked, in one shape for every protocol: the texts that are checked, and the body that goes upstream."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gateway.settings import GatewaySettings
from services.contracts.chat import Json
from services.contracts.errors import PromptTooLong, RequestError, UnknownModel

MAX_CHOICES = 128  # OpenAI's own limit of n
# What Hugging Face's clients send as the model when they were given only a URL. (A tuple: a name may be anything.)
PLACEHOLDERS = (None, "dummy", "tgi")
# Words of the protocols and of JSON Schema. They say nothing by themselves, and would bury the text between them.
_PROTOCOL_WORDS = {
    *("additionalProperties", "arguments", "array", "auto", "boolean", "default", "description", "enum", "function"),
    *("id", "integer", "items", "json", "json_object", "json_schema", "name", "none", "null", "number", "object"),
    *("parameters", "properties", "regex", "required", "schema", "strict", "string", "text", "title", "type", "value"),
}


_BOOLEAN = TypeAdapter(bool)
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


class Kind(Enum):
    """Whose words a turn holds: the asker's, the assistant's, or what was given along (tools and their results)."""

    ASKED = auto()
    ANSWERED = auto()
    GIVEN = auto()


@dataclass(frozen=True)
class Turn:
    """One text that the model reads."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Asked:
    """A request that may be served.

    ``turns`` hold all text of ``content``, the body that goes upstream. ``prompts`` are what the answers answer:
    one, or several with equally many of the ``choices`` each. ``answer_tokens`` is the most that each may have, where
    the client says so. ``echoed`` stands before a TGI answer's text, and ``details`` says that its tokens were asked
    for.
    """

    model: str
    turns: tuple[Turn, ...]
    prompts: tuple[str, ...]
    content: bytes
    stream: bool
    choices: int = 1
    answer_tokens: int | None = None
    echoed: str = ""
    details: bool = False

    def prompt_of(self, index: int) -> str:
        """The prompt that one choice answers."""
        return self.prompts[index * len(self.prompts) // self.choices]


def wants_stream(raw: Json) -> bool:
    """Whether a body asks for a stream, in whatever way a boolean may be written; the reader refuses what is none."""
    try:
        return _BOOLEAN.validate_python(raw.get("stream") or False)
    except ValidationError:
        return False


def has_words(text: str) -> bool:
    """There is a letter or a digit of any script; on other texts a classifier has no verdict."""
    return any(character.isalnum() for character in text)


def strings_in(*values: Any) -> Iterator[str]:
    """Every string in JSON values, names of fields too; of JSON with escapes inside a string, what it means as well."""
    stack = list(reversed(values))
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield _without_half_characters(value)
            stack.append(_decoded(value))
        elif isinstance(value, dict):
            stack.extend(part for pair in reversed(value.items()) for part in reversed(pair))
        elif isinstance(value, list):
            stack.extend(reversed(value))


def _decoded(text: str) -> Any:
    if "\\" not in text:
        return None
    try:
        return json.loads(text, parse_int=float)  # which takes any number of digits
    except (ValueError, RecursionError):  # cut off, too deep, or not JSON at all
        meant = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), text)
        return None if meant == text else meant


def _without_half_characters(text: str) -> str:
    """The text with surrogate pairs put together and single ones left out: JSON can escape them, UTF-8 has none."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def given(*values: Any) -> Turn:
    """What stands in other fields than those of the plain text, as one text."""
    texts = (text for text in strings_in(*values) if text not in _PROTOCOL_WORDS and has_words(text))
    return Turn(Kind.GIVEN, "\n".join(texts))


def last_prompt(turns: Sequence[Turn]) -> str:
    """The last words of the asker, or where there are none, the last that were given; empty when there are neither."""
    for kind in (Kind.ASKED, Kind.GIVEN):
        for turn in reversed(turns):
            if turn.kind is kind and has_words(turn.text):
                return turn.text
    return ""


def check_length(turns: Sequence[Turn], param: str, settings: GatewaySettings) -> None:
    """Raise PromptTooLong when there is more text than may be sent."""
    total = sum(len(turn.text) for turn in turns)
    if total > settings.prompt_limit_characters:
        limit = settings.prompt_limit_characters
        raise PromptTooLong(f"{param}: {total} characters; at most {limit} are accepted", param=param)


def resolve_model(name: Any, settings: GatewaySettings, *, param: str = "model") -> str:
    """The name to ask the inference service for; raises UnknownModel unless it is the served or an allowed one."""
    if name in PLACEHOLDERS:
        return settings.served_model_name
    if not isinstance(name, str):
        raise RequestError(f"{param}: has to be a name", param=param)
    if name not in settings.model_names:
        raise UnknownModel(f"{param}: there is no model of this name; GET /v1/models lists them", param=param)
    return name


def encode_body(fields: Json) -> bytes:
    """The body that goes upstream; raises RequestError for what JSON does not have."""
    try:
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "the body holds NaN, Infinity, half a surrogate pair or too many levels; JSON has none of these"
        ) from error
