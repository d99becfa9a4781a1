"""The adapter registry: adapter directories that are either whole and hash-checked, or not there."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save

from services.contracts.adapters import (
    CONFIG,
    CONFIG_PIN,
    MANIFEST,
    WEIGHTS,
    AdapterManifest,
    file_sha256,
    read_manifest,
)
from trainer.aggregation import Arrays, check_arrays
from trainer.files import new_directory, writing


def write_adapter(
    directory: Path, arrays: Arrays, adapter_config: str, provenance: Mapping[str, Any]
) -> AdapterManifest:
    """Write an adapter directory in one step; an older one of the same name is replaced.

    Args:
        directory: where it goes; it appears only when it is complete.
        arrays: the weights, by PEFT's parameter names.
        adapter_config: PEFT's ``adapter_config.json``.
        provenance: the manifest's fields but for the hash of the weights, which is taken here.

    Raises:
        AdapterError: the weights hold NaN or infinity.
        ConfigError: it cannot be written, for example because the disk is full.
    """
    check_arrays(f"adapter {directory}", arrays, reference=arrays)
    with writing(directory), new_directory(directory) as partial:
        (partial / CONFIG).write_text(adapter_config, encoding="utf-8")
        # One key only: safetensors writes several in an order that changes, and the hash with it. PEFT needs no other.
        metadata = {CONFIG_PIN: file_sha256(partial / CONFIG)}
        (partial / WEIGHTS).write_bytes(save(dict(sorted(arrays.items())), metadata=metadata))
        manifest = AdapterManifest(sha256=file_sha256(partial / WEIGHTS), **provenance)
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_adapter(directory: Path, expected_sha256: str | None = None) -> tuple[Arrays, AdapterManifest]:
    """Read an adapter and check its hash; raises AdapterError or AdapterHashMismatch."""
    manifest = read_manifest(directory, expected_sha256)
    return load_file(directory / WEIGHTS), manifest


def copy_adapter(source: Path, target: Path, manifest: AdapterManifest) -> None:
    """Copy an adapter's files byte by byte, with another manifest; ``target`` appears only when it is complete.

    Raises:
        AdapterError: the copy is not the adapter that the manifest is about.
        ConfigError: it cannot be written.
    """
    with writing(target), new_directory(target) as partial:
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(source / name, partial / name)
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        read_manifest(partial)
