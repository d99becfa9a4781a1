"""The adapter registry: adapter directories that are either whole and hash-checked, or not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from services.contracts.adapters import CONFIG, MANIFEST, WEIGHTS, AdapterManifest, file_sha256, read_manifest
from trainer.aggregation import Arrays
from trainer.files import new_directory


def write_adapter(
    directory: Path, arrays: Arrays, adapter_config: str, provenance: Mapping[str, Any]
) -> AdapterManifest:
    """Write an adapter directory in one step; an older one of the same name is replaced.

    Args:
        directory: where it goes; it appears only when it is complete.
        arrays: the weights, by PEFT's parameter names.
        adapter_config: PEFT's ``adapter_config.json``.
        provenance: the manifest's fields but for the hash of the weights, which is taken here.
    """
    with new_directory(directory) as partial:
        save_file(dict(sorted(arrays.items())), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(adapter_config, encoding="utf-8")
        manifest = AdapterManifest(sha256=file_sha256(partial / WEIGHTS), **provenance)
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_adapter(directory: Path, expected_sha256: str | None = None) -> tuple[Arrays, AdapterManifest]:
    """Read an adapter and check its hash; raises AdapterError or AdapterHashMismatch."""
    manifest = read_manifest(directory, expected_sha256)
    return load_file(directory / WEIGHTS), manifest


def copy_adapter(source: Path, target: Path, evaluation: dict[str, Any]) -> AdapterManifest:
    """Copy a checked adapter and write its evaluation into the copy's manifest."""
    arrays, manifest = read_adapter(source)
    provenance = manifest.model_dump(exclude={"sha256"}) | {"evaluation": evaluation}
    copy = write_adapter(target, arrays, (source / CONFIG).read_text("utf-8"), provenance)
    read_manifest(target, expected_sha256=manifest.sha256)  # the copy has to be the adapter that was evaluated
    return copy
