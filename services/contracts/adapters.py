"""Contract of an adapter directory: LoRA weights as safetensors, PEFT's config, and a manifest beside them.

::

    <adapter>/adapter_model.safetensors   the weights
    <adapter>/adapter_config.json         PEFT's configuration
    <adapter>/manifest.json               where the adapter comes from, with the weights' sha256

An adapter is identified by the sha256 of its weights file. The same weights mean something else under another
configuration (rank, alpha, target modules), so the weights file pins it: its safetensors metadata holds the sha256 of
``adapter_config.json``. Whoever insists on an adapter's hash thereby insists on its configuration too. Adapters of
other writers, PEFT for example, pin none and are read without this check. There is no pickle anywhere.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contracts.constitution import describe
from services.contracts.errors import AdapterError, AdapterHashMismatch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
CONFIG_PIN = "adapter_config_sha256"  # key in the metadata of the weights
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library takes no longer header either


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


class CanaryRequest(BaseModel):
    """Body of ``POST /v1/release/canary``: answer this share of the requests with this loaded adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    sha256: str
    percent: float = Field(gt=0.0, le=100.0, allow_inf_nan=False)


class Canary(BaseModel):
    """The candidate that answers ``percent`` % of the requests for the served model."""

    adapter: str
    sha256: str
    percent: float


class Release(BaseModel):
    """Answer of ``GET /v1/release``: what the service answers with when a request names the served model."""

    served_model: str
    adapter: str | None
    sha256: str | None
    previous: str | None = None
    canary: Canary | None = None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path, expected_sha256: str | None = None) -> AdapterManifest:
    """Read an adapter directory's manifest and check the weights and the configuration against it.

    Raises:
        AdapterError: a file is missing, or the manifest is malformed.
        AdapterHashMismatch: the weights' sha256 is not the manifest's, or not ``expected_sha256``; or the configuration
            is not the one that the weights pin.
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
    with (directory / WEIGHTS).open("rb") as weights:
        check_config(directory, weights, (directory / CONFIG).read_bytes())
    return manifest


def check_config(directory: Path, weights: BinaryIO, config: bytes) -> None:
    """Raise AdapterHashMismatch when ``config`` is not the configuration that the weights file pins, if it pins one."""
    pinned, found = _pinned_config(weights), hashlib.sha256(config).hexdigest()
    if pinned is not None and pinned != found:
        raise AdapterHashMismatch(f"adapter {directory}: {CONFIG} has sha256 {found}, but {WEIGHTS} pins {pinned}")


def _pinned_config(weights: BinaryIO) -> str | None:
    """The sha256 that the metadata of a safetensors file holds; None without one, or when it is no safetensors file.

    The format begins with the header's length (8 bytes, little-endian) and the header in JSON. It is read here because
    the contracts use no library, and a file that is not in this format is refused by whoever loads its tensors.
    """
    length = int.from_bytes(weights.read(8), "little")
    try:
        header = json.loads(weights.read(min(length, _HEADER_LIMIT)))
    except (ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata.get(CONFIG_PIN) if isinstance(metadata, dict) else None
