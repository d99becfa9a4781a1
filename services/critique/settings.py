"""Settings of the critique service: flags and ``FEDWARD_CRITIQUE_*`` variables."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.settings import Settings

DEFAULT_CONSTITUTION = Path(__file__).parent / "constitutions" / "default.toml"


class CritiqueSettings(Settings):
    """Which constitution holds, and which model applies it."""

    model_config = SettingsConfigDict(env_prefix="FEDWARD_CRITIQUE_")

    port: int = Field(default=8102, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    constitution: Path = Field(
        default=DEFAULT_CONSTITUTION, description="TOML file of principles; the shipped one by default"
    )
    backend: Literal["local", "openai"] = Field(
        default="local", description="local: a model in this process; openai: any OpenAI-compatible server"
    )
    model: str | None = Field(
        default=None,
        description="local: folder or Hub name, the shipped miniature by default; openai: the server's model name",
    )
    upstream_url: str | None = Field(default=None, description="openai: where the server listens")
    upstream_api_key: SecretStr | None = Field(default=None, description="openai: key sent to the server")
    upstream_concurrency: int = Field(default=8, ge=1, description="openai: most requests at the same time")
    upstream_timeout_seconds: float = Field(default=60.0, gt=0, description="openai: deadline of one request")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="local: auto takes a GPU if there is one"
    )
    threads: int = Field(default=1, ge=1, description="local: CPU threads for one model step")
    max_batch: int = Field(default=64, ge=1, description="local: most texts written at the same time")
    critique_tokens: int = Field(default=64, ge=1, description="longest critique")
    revision_tokens: int = Field(default=128, ge=1, description="longest revision; one that is cut off is rejected")
    max_items: int = Field(default=256, ge=1, description="most items in one request")
    max_waiting_items: int = Field(default=2048, ge=1, description="most items in work or waiting; beyond it: 429")

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "openai" and not (self.upstream_url and self.model):
            raise ValueError("backend openai needs both upstream_url and model")
        if self.backend == "local" and self.upstream_url:
            raise ValueError("upstream_url is given, but backend is local; add --backend openai or drop it")
        if self.max_waiting_items < self.max_items:
            raise ValueError("max_waiting_items must be at least max_items")
        return self
