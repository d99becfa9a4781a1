"""The limits on tenants: what a limits file says, and the settings around it."""

import math
import tomllib
from pathlib import Path
from typing import Literal

from limits import RateLimitItem, parse_many
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from services.contracts.chat import Json
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError

Kind = Literal["requests", "tokens"]
CHARACTERS_PER_TOKEN = 4  # of English text; the reservation is an estimate, the settlement is not


class Quota(BaseModel):
    """One tenant's limits, as the ``limits`` library writes them: ``60/minute; 1000/hour``. Empty: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: str = ""
    tokens: str = ""

    @field_validator("requests", "tokens")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            try:
                items = parse_many(value)
            except ValueError as error:
                raise ValueError(f"{value!r} is no limit; write for example '60/minute; 1000/hour'") from error
            if any(item.amount < 1 for item in items):
                raise ValueError(f"{value!r}: a limit is at least 1")
        return value

    def items(self, kind: Kind) -> list[RateLimitItem]:
        """The limits on requests or tokens."""
        text = self.requests if kind == "requests" else self.tokens
        return parse_many(text) if text else []


class Quotas(BaseModel):
    """The limits file: a quota for everybody, and others for tenants by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Quota = Quota()
    tenants: dict[str, Quota] = Field(default_factory=dict)

    def of(self, tenant: str) -> Quota:
        """The quota of one tenant."""
        return self.tenants.get(tenant, self.default)


class LimitsSettings(BaseModel):
    """Where limits stand, where they are counted, and what happens when they cannot be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits_file: Path | None = Field(default=None, description="TOML with the tenants' limits; without it: none")
    limits_url: SecretStr | None = Field(
        default=None, description="redis:// or rediss:// URL that all replicas count in; without it: in memory"
    )
    limits_failure: Literal["refuse", "local"] = Field(
        default="refuse", description="when Redis is away: refuse with 503, or count in this process only"
    )

    @field_validator("limits_url")
    @classmethod
    def _is_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("redis://", "rediss://", "redis+unix://")):
            raise ValueError("must start with redis://, rediss:// or redis+unix://")
        return value


def read_quotas(path: Path) -> Quotas:
    """Read a limits file; raises ConfigError that names the file and the key at fault."""
    try:
        return Quotas.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the limits: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error


def moderated_characters(body: Json) -> int:
    """How much text a moderation request has; what is no text is for the safety service to refuse."""
    texts = body.get("input")
    return sum(len(text) for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str))


def estimate_tokens(prompt_characters: int, answer_limit: int) -> int:
    """Tokens to reserve for a request: its prompt's, at four characters each, and as many as the answer may have."""
    return math.ceil(prompt_characters / CHARACTERS_PER_TOKEN) + answer_limit
