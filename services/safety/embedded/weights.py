"""The weights of a tier: half-precision tensors in safetensors' format, and a manifest that holds their sha256."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from services.common.files import replace_file
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
METADATA = "fedward"  # one key, since safetensors writes several in any order: the same weights have one hash
SHIPPED = Path(__file__).parent / "weights"

Array = npt.NDArray[np.float16]


class Manifest(BaseModel):
    """What stands beside the weights: their hash, where they come from, and how well they do."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    model_id: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    data_sha256: dict[str, str] = Field(default_factory=dict)
    rows: dict[str, int] = Field(default_factory=dict)
    validation: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class WeightsFile:
    """Tensors by name, the text metadata that is hashed with them, and the manifest."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    manifest: Manifest


def write_weights(folder: Path, tensors: dict[str, Array], metadata: dict[str, str], manifest: Manifest) -> Manifest:
    """Write weights and manifest; the same content gives the same bytes. Returns the manifest with its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: np.ascontiguousarray(tensor, "<f2") for name, tensor in tensors.items()}
    content = save(halves, {METADATA: json.dumps(metadata, sort_keys=True)})
    replace_file(folder / WEIGHTS, content)
    hashed = manifest.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    write_manifest(folder, hashed)
    return hashed


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest alone, for example with new figures."""
    replace_file(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def read_weights(folder: Path) -> WeightsFile:
    """Read weights and check them against their manifest.

    Raises:
        ConfigError: a file is missing or malformed, or the weights are not those that the manifest describes.
    """
    path = folder / WEIGHTS
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot read the safety model: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"{folder / MANIFEST}: {describe(error)}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.sha256:
        raise ConfigError(f"{path} has sha256 {found}, but {MANIFEST} says {manifest.sha256}; restore it or train anew")
    try:
        with safe_open(path, "np") as file:
            return WeightsFile(load(content), json.loads(file.metadata()[METADATA]), manifest)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a safetensors file of this version: {error!r}") from error
