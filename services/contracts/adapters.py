"""Contract of an adapter directory: LoRA weights as safetensors, PEFT's config, and a manifest beside them.

::

    <adapter>/adapter_model.safetensors   the weights
    <adapter>/adapter_config.json         PEFT's configuration
    <adapter>/manifest.json               where the adapter comes from, with the weights' sha256

An adapter is identified by the sha256 of its weights file. There is no pickle anywhere.
"""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contracts.constitution import describe
from services.contracts.errors import AdapterError, AdapterHashMismatch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"


class AdapterManifest(BaseModel):
    """Provenance of one adapter; ``evaluation`` is filled in at release."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    base_model_id: str
    base_model_sha256: str
    arm: str
    round_number: int = Field(ge=0)
    config: dict[str, Any]
    constitution_sha256: str | None = None
    filter_model_id: str | None = None
    filter_model_sha256: str | None = None
    data_counts: dict[str, int] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


class LoadAdapterRequest(BaseModel):
    """Body of ``POST /v1/load_lora_adapter`` (vLLM's field names, plus the hash to insist on)."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")
    lora_path: str
    sha256: str | None = None


class UnloadAdapterRequest(BaseModel):
    """Body of ``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


class AdapterInfo(BaseModel):
    """Answer of ``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: the adapter that was meant."""

    lora_name: str
    sha256: str


class ActivateRequest(BaseModel):
    """Body of ``POST /v1/release``: serve this loaded adapter, which must have this sha256."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    sha256: str


class Release(BaseModel):
    """Answer of ``GET /v1/release``: what the service answers with when a request names the served model."""

    served_model: str
    adapter: str | None
    sha256: str | None
    previous: str | None = None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path, expected_sha256: str | None = None) -> AdapterManifest:
    """Read an adapter directory's manifest and check the weights against it.

    Raises:
        AdapterError: a file is missing, or the manifest is malformed.
        AdapterHashMismatch: the weights' sha256 is not the manifest's, or not ``expected_sha256``.
    """
    for name in (WEIGHTS, CONFIG, MANIFEST):
        if not (directory / name).is_file():
            raise AdapterError(f"adapter {directory}: {name} is missing")
    try:
        manifest = AdapterManifest.model_validate_json((directory / MANIFEST).read_bytes())
    except ValidationError as error:
        raise AdapterError(f"{directory / MANIFEST}: {describe(error)}") from error
    found = file_sha256(directory / WEIGHTS)
    for source, wanted in ((MANIFEST, manifest.sha256), ("the request", expected_sha256)):
        if wanted is not None and wanted != found:
            raise AdapterHashMismatch(f"adapter {directory}: {WEIGHTS} has sha256 {found}, but {source} says {wanted}")
    return manifest
