"""What chat and text completions have in common: the fields of a request, the head of an answer, errors."""

import re

from pydantic import BaseModel

from gateway.answers import Head, checked_name
from gateway.asked import MAX_CHOICES, Turn, given
from gateway.upstreams import status_of
from services.contracts.chat import Json, Usage
from services.contracts.errors import FedwardError, RequestError

END = "[DONE]"
# What OpenAI's clients may send along for OpenAI's own bookkeeping; it says nothing to the model and is left out.
IGNORED_FIELDS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# What servers read as input although no check can: token ids, embeddings, media, and templates, which compute text.
REFUSED_FIELDS = (
    "audio_data",
    "chat_template",
    "image_data",
    "images",
    "input_embeds",
    "input_ids",
    "mm_processor_kwargs",
    "multi_modal_data",
    "prompt_embeds",
    "prompt_token_ids",
    "video_data",
)
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
# Texts that the model does not read.
_NOT_READ = ("adapter_id", "model", "stop", "stream_options")


def other_fields(fields: Json, known: tuple[str, ...]) -> tuple[Json, Turn]:
    """The fields beside the ``known`` ones: as they go upstream, and all text in them, which is checked.

    Raises:
        RequestError: a field brings input that nothing can check.
    """
    for name in REFUSED_FIELDS:
        if fields.get(name):
            raise RequestError(f"{name}: not supported, since nothing can check it; leave it out", param=name)
    left_out = (*known, *IGNORED_FIELDS, *REFUSED_FIELDS)
    options = {name: value for name, value in fields.items() if name not in left_out}
    wanted = options.pop("stream_options", None)
    if isinstance(wanted, dict):
        options["stream_options"] = {"include_usage": wanted.get("include_usage") is True}
    return options, text_given(options)


def text_given(options: Json) -> Turn:
    """All text in these fields, but for those that the model does not read; numbers and switches are no text."""
    texts = {name: value for name, value in options.items() if isinstance(value, str | dict | list)}
    return given(*(value for name, value in texts.items() if name not in _NOT_READ))


def choices_asked(fields: Json) -> int:
    """How many answers are asked for; raises RequestError for what is no such number."""
    n = fields.get("n", 1)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"n: has to be a number from 1 to {MAX_CHOICES}", param="n")
    return n


def token_text(name: str) -> str:
    """The text of a token as OpenAI writes it; of ``bytes:\\xe6\\x9d``, a part of a character, the escaped bytes."""
    match = _BYTES.fullmatch(name)
    return bytes.fromhex(match[1].replace("\\x", "")).decode("utf-8", "surrogateescape") if match else name


class AnswerHead(BaseModel):
    """What every answer and every event of OpenAI's protocols begins with."""

    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    usage: Usage | None = None

    def head(self) -> Head:
        """Its names, if they look like names; raises UpstreamUnavailable otherwise."""
        for name in (self.id, self.model, self.system_fingerprint):
            checked_name(name or "")
        return Head(self.id, self.created, self.model, self.system_fingerprint)


def headed(head: Head, kind: str) -> Json:
    """The beginning of an answer or event."""
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def error(problem: FedwardError) -> tuple[int, Json]:
    """HTTP status and body of an error."""
    return status_of(problem), problem.body()
