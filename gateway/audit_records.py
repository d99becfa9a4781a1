"""What the audit keeps of a request, and the hash that chains one record to the next.

One record for one request, with the list of its decisions, and not one for every checked unit of a stream: the record
is then whole or absent, one transaction and one hash cover it, and a stream of 50 units costs one row.

The hash of a row is sha256 over ``previous:chain:seq:body``, where ``previous`` is the hash of the row before it
(64 zeros for the first) and ``body`` the record as JSON exactly as it is stored. A kept text is outside of the body,
which holds only its hash: it can be deleted later without breaking the chain.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.contracts.errors import ConfigError
from services.contracts.verdicts import Verdict

FIRST = "0" * 64
SHORTEST_KEY = 32  # bytes


def _storable(value: object) -> object:
    """A name from outside, shortened, and with what no database can store (half characters, NUL) replaced."""
    if not isinstance(value, str):
        return value
    return value[:256].encode("utf-8", "replace").decode().replace("\0", "?")


Name = Annotated[str, BeforeValidator(_storable)]


class VerdictEntry(BaseModel):
    """The classifier's finding on one window of a text."""

    model_config = ConfigDict(frozen=True)

    outcome: str
    score: float | None = None
    categories: dict[str, float] = Field(default_factory=dict)


class DecisionEntry(BaseModel):
    """What was decided on a prompt, or on one unit of an answer, and from which verdicts.

    ``action`` is what the policy decided; with ``shadow`` it was recorded only, and the text went on.
    """

    model_config = ConfigDict(frozen=True)

    direction: str
    action: str
    shadow: bool = False
    categories: tuple[str, ...] = ()
    verdicts: tuple[VerdictEntry, ...] = ()
    characters: int = 0
    check_ms: float | None = None

    @classmethod
    def of(
        cls,
        direction: str,
        action: str,
        verdicts: Iterable[Verdict],
        *,
        shadow: bool = False,
        categories: tuple[str, ...] = (),
        characters: int = 0,
        check_ms: float | None = None,
    ) -> Self:
        """From the verdicts as the safety service gives them; scores to four places."""
        entries = tuple(
            VerdictEntry(
                outcome=verdict.outcome.value,
                score=None if verdict.score is None else round(verdict.score, 4),
                categories={name: round(score, 4) for name, score in verdict.categories.items()},
            )
            for verdict in verdicts
        )
        return cls(
            direction=direction,
            action=action,
            shadow=shadow,
            categories=categories,
            verdicts=entries,
            characters=characters,
            check_ms=None if check_ms is None else round(check_ms, 2),
        )


class RepairEntry(BaseModel):
    """What came of redacting or revising one choice: ``done``, or why it was refused (``gateway/repair.py``)."""

    model_config = ConfigDict(frozen=True)

    choice: int
    action: str
    outcome: str


class AuditRecord(BaseModel):
    """One request's way through the gateway. Field order is the order in the stored JSON.

    ``kind`` is ``gap`` for the record that the audit writes about itself when it could not write for a while.
    ``action`` is what the client got; ``error`` an error's code, never its text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["request", "gap"] = "request"
    request_id: str = Field(pattern=r"^[ -~]{1,128}$")
    at: str = Field(default_factory=lambda: utc_now(), pattern=r"^[0-9TZ:.-]{24}$")
    tenant: Name = ""
    key_name: str | None = None
    route: Name = ""
    protocol: str = ""
    action: str = ""
    decisions: tuple[DecisionEntry, ...] = ()
    repairs: tuple[RepairEntry, ...] | None = None
    prompt_hmac: str | None = None
    released_characters: int = 0
    model: Name | None = None
    adapter_sha256: str | None = None
    constitution_sha256: Name | None = None
    policy_sha256: str | None = None
    classifier_id: Name | None = None
    latency_ms: float | None = None
    error: Name | None = None
    text_sha256: str | None = None


class AuditRow(NamedTuple):
    """One row of the table. ``at``, ``tenant`` and ``request_id`` repeat the body's, to be searched for."""

    chain: str
    seq: int
    at: str
    tenant: str
    request_id: str
    body: str
    text: str | None
    hash: str


class Place(NamedTuple):
    """Where a row stands among the rows of all chains, by time."""

    at: str
    seq: int
    chain: str


class Prepared(NamedTuple):
    """A record ready to be chained: serialised by its own request, so that what cannot be written fails there."""

    record: AuditRecord
    body: str
    text: str | None


def utc_now() -> str:
    """The time in UTC to the millisecond, in a form that sorts: ``2026-11-21T09:30:00.125Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def prepare(record: AuditRecord, text: dict[str, str] | None = None) -> Prepared:
    """Serialise a record, and with it the plain text of the request where that is kept.

    The text gets random salt, so that once it is deleted its hash tells nothing.
    """
    stored = None
    if text is not None:
        stored = json.dumps({"salt": secrets.token_hex(16), **text})
        record = record.model_copy(update={"text_sha256": text_hash(stored)})
    return Prepared(record, record.model_dump_json(exclude_none=True, ensure_ascii=True), stored)


def chain_rows(chain: str, seq: int, previous: str, records: Sequence[Prepared]) -> list[AuditRow]:
    """Rows for records that follow row ``seq`` of a chain, whose hash is ``previous``."""
    rows = []
    for record, body, text in records:
        seq += 1
        previous = row_hash(previous, chain, seq, body)
        rows.append(AuditRow(chain, seq, record.at, record.tenant, record.request_id, body, text, previous))
    return rows


def row_hash(previous: str, chain: str, seq: int, body: str) -> str:
    """The hash that chains a row to the one before."""
    return hashlib.sha256(f"{previous}:{chain}:{seq}:{body}".encode("utf-8", "surrogatepass")).hexdigest()


def text_hash(stored: str) -> str:
    """The hash of a kept text with its salt."""
    return hashlib.sha256(stored.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_hmac(key: bytes, prompt: str) -> str:
    """HMAC-SHA256 of a prompt: who has the key can find a prompt's requests; nobody else can try prompts out."""
    return hmac.digest(key, prompt.encode("utf-8", "surrogatepass"), "sha256").hex()


def read_audit_key(path: Path | None) -> bytes:
    """The operator's key. Without a file a random one that ends with the process: fit for development only.

    Raises:
        ConfigError: the file cannot be read or is too short to be a key.
    """
    if path is None:
        return secrets.token_bytes(SHORTEST_KEY)
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the audit key: {error.strerror}", param="audit_key_file") from error
    if len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"{path}: an audit key has at least {SHORTEST_KEY} bytes; run: head -c 32 /dev/urandom > {path}",
            param="audit_key_file",
        )
    return key
