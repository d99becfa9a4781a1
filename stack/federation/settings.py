"""What a coordinator and a silo are started with: one TOML file each."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contracts.constitution import describe
from services.contracts.errors import ConfigError
from stack.federation.credentials import Credentials

Config = TypeVar("Config", bound=BaseModel)


class CoordinatorConfig(BaseModel):
    """A coordinator's place, credentials and silos."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path = Field(description="where the SuperLink's database and all logs are kept")
    run_dir: Path = Field(description="the run folder, as run_config names it")
    run_config: Path = Field(description="TOML file of run-config keys that differ from pyproject's defaults")
    credentials_dir: Path
    silo_keys: tuple[Path, ...] = Field(description="public keys of the silos; the first is client 0's, and so on")
    bundle: Path = Field(description="the app bundle, with its signature beside it")
    fleet_bind: str = Field(description="address and port that silos reach")
    status_bind: str = "127.0.0.1:8405"
    superlink_port: int = Field(description="on the loopback only")
    attempts: int = Field(default=5, ge=1, description="how often a run whose ServerApp was lost is started anew")

    @property
    def credentials(self) -> Credentials:
        """The coordinator's files; it needs no silo's private key and not the signing key."""
        return Credentials(self.credentials_dir)


class SiloConfig(BaseModel):
    """A silo's place, credentials, data and services. Nothing of it reaches the coordinator but the public key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=0, description="the client number that the coordinator registered this silo's key for")
    state_dir: Path = Field(description="where the curated shard and all logs are kept")
    superlink: str = Field(description="host:port of the coordinator")
    authority: Path = Field(description="certificate of the authority that signed the coordinator's")
    private_key: Path
    task_secret: Path
    trusted_entities: Path = Field(description="the keys whose app bundles may run here")
    shard: Path = Field(description="this silo's own data, JSONL")
    runtime_port: int = Field(description="of the SuperNode, on the loopback only")
    safety_port: int | None = Field(default=None, description="start a safety service there; else safety_url is used")
    safety_url: str = ""
    critique_url: str = ""


def read_config(kind: type[Config], path: Path) -> Config:
    """Read a TOML file; raises ConfigError naming the file and the key."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
