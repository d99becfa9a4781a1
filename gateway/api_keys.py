"""API keys: random secrets of which only hashes are kept, in one JSON file.

A key is ``fw-`` and 256 random bits. It is shown once, when it is made; the file holds its sha256. A plain hash is
enough here: unlike a password, the key has too much randomness to be guessed from its hash.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.common.files import replace_file
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError

PREFIX = "fw-"
# No colon: tenants that come from a token's subject have one, so that no user can choose a key's tenant as a name.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
WRITABLE_BY_OTHERS = 0o022


class ApiKey(BaseModel):
    """One key, without the key: ``sha256`` is that of its text. A revoked key stays in the file, as a record."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: str = Field(pattern=NAME)
    name: str = Field(pattern=NAME)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class KeysFile(BaseModel):
    """The content of the file; a key is named by its tenant and its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same sha256")
        if len({(key.tenant, key.name) for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same tenant and name")
        return self


class NewKey(NamedTuple):
    """A key that has just been made: its text, which nothing can bring back later, and what is kept of it."""

    secret: str
    entry: ApiKey


def hash_key(secret: str) -> str:
    """The sha256 of a key's text, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(tenant: str, name: str, expires: datetime | None = None) -> NewKey:
    """Make a key; nothing is written."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = ApiKey(sha256=hash_key(secret), tenant=tenant, name=name, created=_now(), expires=expires)
    return NewKey(secret, entry)


def read_keys(path: Path) -> KeysFile:
    """Read the keys file.

    Raises:
        ConfigError: it cannot be read, is malformed, or others than its owner may write to it.
    """
    try:
        mode = path.stat().st_mode
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the API keys: {error.strerror}; make one: python -m gateway keys create"
        ) from error
    if mode & WRITABLE_BY_OTHERS:
        raise ConfigError(f"{path}: others than its owner may add keys to it; run: chmod go-w {path}")
    try:
        return KeysFile.model_validate_json(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error


def index_keys(path: Path) -> Mapping[str, ApiKey]:
    """The keys of a file by their hashes; raises as ``read_keys`` does."""
    return {key.sha256: key for key in read_keys(path).keys}


def find_key(keys: Mapping[str, ApiKey], secret: str) -> ApiKey | None:
    """The entry of a key's text, whatever its state.

    The search goes by the hash, so its timing tells about hashes and not about keys; the comparison that decides is
    a constant-time one all the same.
    """
    presented = hash_key(secret)
    entry = keys.get(presented)
    return entry if entry is not None and hmac.compare_digest(entry.sha256, presented) else None


@contextmanager
def _editing(path: Path) -> Iterator[list[ApiKey]]:
    """The file's keys to be changed in place; they are written whole at the end, by one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_keys(path).keys) if path.exists() else []
        yield keys
        content = KeysFile(keys=tuple(keys)).model_dump(mode="json")
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)
    finally:
        os.close(lock)  # which also unlocks it


def add_key(path: Path, new: NewKey) -> None:
    """Write a new key's entry.

    Raises:
        ConfigError: there is one of that tenant and name, or the file is malformed.
        OSError: the file cannot be written; it is then as it was.
    """
    with _editing(path) as keys:
        if any((key.tenant, key.name) == (new.entry.tenant, new.entry.name) for key in keys):
            raise ConfigError(
                f"{path}: tenant {new.entry.tenant} has a key named {new.entry.name}; choose another --name"
            )
        keys.append(new.entry)


def revoke_key(path: Path, tenant: str, name: str) -> ApiKey:
    """Mark a key as revoked from now on; gateways that watch the file refuse it within two seconds.

    Raises:
        ConfigError: there is no such key, or the file is malformed.
        OSError: the file cannot be written; it is then as it was.
    """
    with _editing(path) as keys:
        for i, key in enumerate(keys):
            if (key.tenant, key.name) == (tenant, name):
                keys[i] = key.model_copy(update={"revoked": key.revoked or _now()})
                return keys[i]
        raise ConfigError(f"{path}: tenant {tenant} has no key named {name}; see: python -m gateway keys list")


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
