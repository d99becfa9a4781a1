"""The weights file: written and read without loss, and refused when it is not what its manifest says."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.contracts.errors import ConfigError
from services.safety.embedded.ngram import load_ngram
from services.safety.embedded.weights import MANIFEST, SHIPPED, WEIGHTS, Manifest, read_weights, write_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped weights that a test may damage."""
    for name in (WEIGHTS, MANIFEST):
        (tmp_path / name).write_bytes((SHIPPED / "ngram" / name).read_bytes())
    return tmp_path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float16), "b": np.ones((2, 3), np.float16)}
    written = write_weights(tmp_path, tensors, {"bias": "0.5"}, Manifest(model_id="m", sha256="0" * 64))
    file = read_weights(tmp_path)
    assert file.metadata == {"bias": "0.5"}
    assert file.manifest == written
    assert {name: tensor.tolist() for name, tensor in file.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float16)}
    metadata = dict.fromkeys("pqrstuv", "v")
    manifest = Manifest(model_id="m", sha256="0" * 64)
    hashes = {write_weights(tmp_path / name, tensors, metadata, manifest).sha256 for name in "abcdef"}
    assert len(hashes) == 1


def test_shipped_weights_are_small() -> None:
    assert (SHIPPED / "ngram" / WEIGHTS).stat().st_size < 1_200_000
    assert (SHIPPED / "encoder" / WEIGHTS).stat().st_size < 4_000_000


@pytest.mark.parametrize("place", [200, 5_000, -1])
def test_tampered_weights_are_refused(folder: Path, place: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors has sha256 .* but manifest\.json says"):
        load_ngram(folder)


def test_changed_manifest_hash_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has sha256"):
        load_ngram(folder)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=name):
        load_ngram(folder)


def test_malformed_manifest_names_the_key(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"model_id": "m", "sha256": "short"}')
    with pytest.raises(ConfigError, match=r"manifest\.json: sha256"):
        load_ngram(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, (2).to_bytes(8, "little") + b"{}"])
def test_garbage_with_a_matching_hash_is_refused(folder: Path, content: bytes) -> None:
    import hashlib

    (folder / WEIGHTS).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load_ngram(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_weights(
        tmp_path, {"prompt": np.ones(4, np.float16)}, {"categories": "S1"}, Manifest(model_id="m", sha256="0" * 64)
    )
    with pytest.raises(ConfigError, match="lack something"):
        load_ngram(tmp_path)
