"""The gateway's settings: flags, or environment variables that start with ``FEDWARD_GATEWAY_``."""

from pathlib import Path
from typing import Self

from pydantic import AnyHttpUrl, Field, model_validator
from pydantic_settings import SettingsConfigDict

from gateway.audit import AuditSettings
from gateway.auth import AuthSettings
from gateway.quotas import LimitsSettings
from services.common.settings import Settings

# What a policy file says by itself, for each tenant and route.
OF_THE_POLICY = ("prompt_threshold", "response_threshold", "check_deadline_ms", "unit_characters", "unit_idle_ms")
LONGEST_UNIT = 10_000  # characters, in a policy file


class GatewaySettings(Settings, AuthSettings, LimitsSettings, AuditSettings):
    """Where the services are, how long to wait for them, and how an answer is cut for checking."""

    model_config = SettingsConfigDict(env_prefix="FEDWARD_GATEWAY_")

    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    inference_url: AnyHttpUrl = Field(
        default=AnyHttpUrl("http://127.0.0.1:8103"), description="where the inference service listens"
    )
    safety_url: AnyHttpUrl = Field(
        default=AnyHttpUrl("http://127.0.0.1:8101"), description="where the safety service listens"
    )
    critique_url: AnyHttpUrl | None = Field(
        default=None, description="where the critique service listens; needed by policies that revise answers"
    )

    served_model_name: str = Field(
        default="fedward", description="the inference service's name for the active release; it is always allowed"
    )
    allowed_models: tuple[str, ...] = Field(
        default=(), description="further names, of the base model or of adapters, that clients may ask for"
    )

    policy_file: Path | None = Field(
        default=None, description="YAML with thresholds, actions and limits per tenant and route; docs/policy.md"
    )

    console: bool = Field(default=True, description="serve the console at /console")

    check_deadline_ms: int = Field(
        default=300, ge=1, le=60_000, description="longest wait for one check; then 503, fail closed"
    )
    connect_seconds: float = Field(default=2.0, gt=0, description="longest wait for a connection to a service")
    generation_seconds: float = Field(default=120.0, gt=0, description="longest wait for a whole answer")
    revise_seconds: float = Field(default=20.0, gt=0, description="longest wait for a revision; then it is a refusal")
    silence_seconds: float = Field(default=30.0, gt=0, description="longest pause inside a streamed answer")
    breaker_failures: int = Field(
        default=5, ge=0, description="leave a service alone after so many failures in a row; 0: never"
    )
    breaker_seconds: float = Field(default=5.0, gt=0, description="for so long, then between trial calls")

    prompt_threshold: float | None = Field(
        default=None, ge=0, le=1, description="refuse prompts with at least this score; unset: the classifier decides"
    )
    response_threshold: float | None = Field(
        default=None, ge=0, le=1, description="refuse answers with at least this score; unset: the classifier decides"
    )

    requests_in_flight: int = Field(default=1024, ge=1, description="most chat requests at work; beyond it: 429")
    message_limit: int = Field(default=100, ge=1, description="most messages in one conversation")
    prompt_limit_characters: int = Field(default=32_000, ge=1, description="most characters in one conversation")
    window_characters: int = Field(
        default=2_000, ge=100, description="longest text given to the classifier; longer ones go in overlapping windows"
    )
    unit_characters: int = Field(
        default=200, ge=20, le=LONGEST_UNIT, description="stream: longest unit of text that is checked at once"
    )
    unit_idle_ms: int = Field(
        default=150, ge=1, le=60_000, description="stream: after this pause, check what has arrived"
    )
    context_characters: int = Field(
        default=1_000, ge=0, description="stream: how much of the answer before a unit is checked along with it"
    )
    safety_calls_in_flight: int = Field(
        default=64,
        ge=1,
        description="calls of the classifier at once, for each tenant; checks beyond it go together in the next call",
    )
    held_limit_characters: int = Field(
        default=200_000, ge=1, description="most characters of one answer held back; an answer over it is cut off"
    )

    @model_validator(mode="after")
    def _a_unit_fits_in_what_is_held(self) -> Self:
        longest = LONGEST_UNIT if self.policy_file else self.unit_characters
        if self.held_limit_characters < longest:
            raise ValueError(f"held_limit_characters must be at least {longest}, the longest unit of text")
        return self

    @model_validator(mode="after")
    def _one_source_of_policy(self) -> Self:
        twice = [name for name in OF_THE_POLICY if self.policy_file and name in self.model_fields_set]
        if twice:
            raise ValueError(f"{', '.join(twice)}: the policy file says this; leave it out, or the file")
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that clients may ask for."""
        return (self.served_model_name, *self.allowed_models)
