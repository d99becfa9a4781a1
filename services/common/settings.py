"""Settings from flags and environment variables, refused by name when unknown or malformed.

A process declares one ``Settings`` subclass; every field is a flag (``--body-limit-bytes``) and an environment
variable (``FEDWARD_SAFETY_BODY_LIMIT_BYTES``). Flags win. A variable that starts with the process's prefix but
matches no field is an error: a misspelt safety setting must not be ignored in silence.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from services.contracts.constitution import describe
from services.contracts.errors import ConfigError, FedwardError


class Settings(BaseSettings):
    """Fields that every HTTP process has."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True
    )

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    body_limit_bytes: int = Field(default=4_000_000, ge=1, description="largest request body accepted")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log level"
    )
    shutdown_seconds: int = Field(default=20, ge=0, description="how long in-flight requests may finish at shutdown")
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector (OTLP/HTTP) for traces; off when unset"
    )


S = TypeVar("S", bound=Settings)


def load_settings(cls: type[S], program: str, summary: str, argv: Sequence[str] | None = None) -> S:
    """Build the settings of a process from ``argv`` and the environment.

    Args:
        cls: the settings class; its ``env_prefix`` names the environment variables.
        program: how the process is started, for example ``python -m services.safety``.
        summary: what it does, with examples; the text of ``--help``.
        argv: the command line without the program's name; ``sys.argv[1:]`` by default.

    Raises:
        ConfigError: naming the flag or variable that is unknown or malformed.
    """
    prefix = cls.model_config.get("env_prefix", "")
    known = {f"{prefix}{name}".upper() for name in cls.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    parser = ArgumentParser(prog=program, description=summary, formatter_class=RawDescriptionHelpFormatter)
    source: CliSettingsSource[ArgumentParser] = CliSettingsSource(cls, root_parser=parser, cli_prog_name=program)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return cls(_cli_settings_source=source(args=arguments))  # type: ignore[call-arg]  # hidden from the signature by pydantic
    except ValidationError as error:
        raise ConfigError(f"{program}: {describe(error)}") from error


def exit_with(error: FedwardError) -> int:
    """Print a deliberate error as one line on stderr and return its exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    return error.exit_code
