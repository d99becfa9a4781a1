"""The constitution file: versioned principles, each with three wordings, and a content hash.

Critique, revision and preference need three different texts per idea (arXiv 2212.08073 publishes separate
lists), so every principle carries all three. The sha256 of the file's bytes goes into each critique, revision,
preference pair and adapter manifest.
"""

import hashlib
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory


class Principle(BaseModel):
    """One rule. ``id`` is stable for ever; an empty ``hazard_categories`` means that it applies to all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    statement: str = Field(min_length=1)
    critique_request: str = Field(min_length=1)
    revision_request: str = Field(min_length=1)
    preference_question: str = Field(min_length=1)
    hazard_categories: tuple[HazardCategory, ...] = ()


class Constitution(BaseModel):
    """A set of principles, as read from one TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    id: str
    version: str
    title: str
    license: str
    language: str = "en"
    principles: tuple[Principle, ...] = Field(min_length=1)
    sha256: str = ""

    @model_validator(mode="after")
    def _unique_ids(self) -> "Constitution":
        ids = [principle.id for principle in self.principles]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise ValueError(f"principle ids must be unique; repeated: {', '.join(repeated)}")
        return self

    def principle(self, principle_id: str) -> Principle:
        """The principle of that id; raises ConfigError when there is none."""
        for principle in self.principles:
            if principle.id == principle_id:
                return principle
        known = ", ".join(principle.id for principle in self.principles)
        raise ConfigError(f"constitution {self.id} has no principle {principle_id!r}; it has: {known}")

    def choose(self, key: str, categories: Sequence[str] = ()) -> Principle:
        """Pick a principle for one prompt: of those for its hazard categories, one by a hash of ``key``.

        The same key always gets the same principle, on every machine and in every run.
        """
        fitting = [p for p in self.principles if set(p.hazard_categories) & set(categories)]
        return random.Random(key).choice(fitting or list(self.principles))


def load_constitution(path: Path) -> Constitution:
    """Read and validate a constitution file; raises ConfigError that names the file and the key at fault."""
    try:
        raw = path.read_bytes()
        values = tomllib.loads(raw.decode("utf-8"))
        return Constitution(**values, sha256=hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the constitution: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{path}: {describe(error)}") from error


def describe(error: ValidationError | TypeError) -> str:
    """A validation error in one line, with the path of each key at fault."""
    if isinstance(error, TypeError):
        return str(error)
    parts = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors(include_url=False)]
    return "; ".join(parts)
