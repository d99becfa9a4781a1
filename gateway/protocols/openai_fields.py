"""What answers of chat and text completions have in common: their head, the text of their tokens, errors."""

import re

from gateway.answers import Head
from gateway.protocols.parts import UpstreamPart
from gateway.upstreams import status_of
from services.contracts.chat import Json, Usage
from services.contracts.errors import FedwardError

END = "[DONE]"
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")


def token_text(name: str) -> str:
    """The text of a token as OpenAI writes it; of ``bytes:\\xe6\\x9d``, a part of a character, the escaped bytes."""
    match = _BYTES.fullmatch(name)
    return bytes.fromhex(match[1].replace("\\x", "")).decode("utf-8", "surrogateescape") if match else name


class AnswerHead(UpstreamPart):
    """What is read of the beginning of an answer or event; its names are text that nobody has checked."""

    system_fingerprint: str | None = None
    usage: Usage | None = None


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
