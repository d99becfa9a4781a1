"""Settings of the safety service: flags, or environment variables that begin with ``FEDWARD_SAFETY_``."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.settings import Settings
from services.safety.weights import SHIPPED


class SafetySettings(Settings):
    """The common settings, and what the classifier needs."""

    model_config = SettingsConfigDict(env_prefix="FEDWARD_SAFETY_")

    port: int = Field(default=8101, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    weights: Path = Field(default=SHIPPED, description="folder with model.safetensors and manifest.json")
    max_items: int = Field(default=256, ge=1, description="most items in one request")
    queue_limit: int = Field(default=64, ge=1, description="most requests at work or waiting; more are answered 429")
