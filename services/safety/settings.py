"""Settings of the safety service: flags, or environment variables that begin with ``FEDWARD_SAFETY_``."""

from pathlib import Path
from typing import Literal

from pydantic import Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.settings import Settings
from services.safety.calibration import PointName
from services.safety.embedded.load import Tier
from services.safety.embedded.weights import SHIPPED
from services.safety.guard.families import FAMILIES


class SafetySettings(Settings):
    """The common settings, and what the classifier needs."""

    model_config = SettingsConfigDict(env_prefix="FEDWARD_SAFETY_")

    port: int = Field(default=8101, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    backend: Literal["embedded", "guard", "cascade"] = Field(
        default="embedded",
        description="the embedded classifier, a guard model, or the guard model for uncertain cases only",
    )
    operating_point: PointName = Field(default="balanced", description="strict finds more and flags more that is safe")
    calibration: Path | None = Field(
        default=None, description="calibration file of the classifier in use, in place of the shipped one"
    )
    max_items: int = Field(default=256, ge=1, description="most items in one request")

    tier: Tier = Field(default="auto", description="embedded model: auto takes the encoder where it has been built")
    weights: Path = Field(default=SHIPPED, description="folder with the embedded models' weights and calibrations")
    encoder: Path | None = Field(default=None, description="folder of the built encoder (default: the user's cache)")
    threads: int = Field(default=1, ge=1, description="batches at work at the same time; one core each")
    queue_windows: int = Field(
        default=8192, ge=1, description="most windows of text waiting; requests beyond are answered 429"
    )
    batch_tokens: int = Field(default=2048, ge=1, description="most tokens in a batch; bounds memory")
    deadline_seconds: float = Field(default=30.0, gt=0, description="how long a request may take before it gets 429")

    guard_family: str | None = Field(default=None, description=f"how the guard model is asked: {', '.join(FAMILIES)}")
    guard_url: HttpUrl | None = Field(default=None, description="OpenAI-compatible server of the guard model")
    guard_model: str | None = Field(default=None, description="its name there; without a URL a Hub name or folder")
    guard_api_key: SecretStr | None = Field(default=None, description="bearer token for that server")
    guard_template: Path | None = Field(default=None, description="prompt file for the families wildguard and generic")
    guard_timeout_seconds: float = Field(default=10.0, gt=0, description="limit for one question to the guard model")
    guard_concurrency: int = Field(default=8, ge=1, description="most questions to the guard model at a time")
    guard_device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="device of an in-process guard")
    guard_calibration: Path | None = Field(default=None, description="calibration file of the guard in a cascade")
    band: tuple[float, float] = Field(
        default=(0.05, 0.95), description="cascade: embedded scores from the first to below the second go to the guard"
    )

    @model_validator(mode="after")
    def _guard_is_whole(self) -> "SafetySettings":
        wanted = self.backend != "embedded"
        if wanted and not (self.guard_family and self.guard_model):
            raise ValueError(f"backend {self.backend} needs guard_family and guard_model")
        if not wanted and (self.guard_family or self.guard_url or self.guard_model):
            raise ValueError("a guard model is named, but backend is embedded; set backend to guard or cascade")
        low, high = self.band
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"band: {low} to {high} is not a range of scores in [0, 1]")
        return self
