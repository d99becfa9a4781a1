"""The weights file: linear heads in safetensors' format, read and written with NumPy alone.

Format (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header with dtype, shape
and offsets of each tensor, then the raw bytes. No pickle. ``manifest.json`` beside it holds the file's sha256.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.files import replace_file
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
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
    measured: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class WeightsFile:
    """Tensors by name, the text metadata that is hashed with them, and the manifest."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    manifest: Manifest


def write_weights(folder: Path, tensors: dict[str, Array], metadata: dict[str, str], manifest: Manifest) -> Manifest:
    """Write weights and manifest; the same content gives the same bytes. Returns the manifest with its sha256."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    head = json.dumps(header, sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    content = len(head).to_bytes(8, "little") + head
    content += b"".join(np.ascontiguousarray(tensor, "<f2").tobytes() for tensor in tensors.values())
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
        return _parse(content, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a safetensors file of float16 tensors: {error!r}") from error


def _parse(content: bytes, manifest: Manifest) -> WeightsFile:
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] != "F16":
            raise ValueError(f"{name} has dtype {entry['dtype']}")
        tensors[name] = np.frombuffer(content[start + first : start + last], "<f2").reshape(entry["shape"])
    return WeightsFile(tensors, metadata, manifest)
