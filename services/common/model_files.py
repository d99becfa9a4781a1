"""Where a language model comes from (the shipped miniature, a folder, the Hub), what identifies it, and its limits."""

import hashlib
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from services.contracts.adapters import file_sha256
from services.contracts.errors import ConfigError

MINIATURE_ID = "fedward-miniature"


class ModelSource(NamedTuple):
    """A model to load: what transformers is given, and the name the model goes by."""

    location: str
    model_id: str


def locate_model(model: str | None) -> ModelSource:
    """Find ``model``: None for the shipped miniature, else a folder, else a Hub name such as ``org/name``.

    Raises:
        ConfigError: the miniature is not installed, or a path that looks local does not exist.
    """
    if model is None:
        return ModelSource(str(_miniature_folder()), MINIATURE_ID)
    folder = Path(model).expanduser()
    if folder.is_dir():
        shipped = folder.resolve().parts[-2:] == ("models", "miniature")
        return ModelSource(str(folder), MINIATURE_ID if shipped else folder.resolve().name)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model {model}: there is no such folder", param="model")
    return ModelSource(model, model.rsplit("/", 1)[-1])


def _miniature_folder() -> Path:
    try:
        folder = Path(str(importlib.resources.files("models") / "miniature"))
    except (ModuleNotFoundError, NotADirectoryError) as error:  # not installed, or installed without its files
        raise ConfigError("the package models, which holds the miniature, is not installed; give --model") from error
    if not (folder / "config.json").is_file():
        raise ConfigError("the miniature model is not installed (models/miniature has no config.json); give --model")
    return folder


def weights_sha256(location: str, cached_file: Callable[..., str | None]) -> str:
    """The hash that an adapter's manifest names as its base model's: the trainer and the inference service agree on it.

    Args:
        location: a folder or a Hub name whose files have been fetched.
        cached_file: ``transformers.utils.hub.cached_file``, given by the caller because this package is without it.

    Returns:
        The sha256 of ``model.safetensors``; for a sharded model, that of its shards' hashes in order.

    Raises:
        OSError: the model has neither that file nor an index of shards.
    """

    def find(name: str) -> Path | None:
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    if single := find("model.safetensors"):
        return file_sha256(single)
    index = find("model.safetensors.index.json")
    if index is None:
        raise OSError(f"{location} has neither model.safetensors nor its index")
    shards = sorted(index.parent.glob("model-*-of-*.safetensors"))
    return hashlib.sha256("".join(file_sha256(shard) for shard in shards).encode()).hexdigest()


def context_tokens(config: Any) -> int:
    """The most tokens that prompt and answer may have together, by a transformers model configuration."""
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 2048))


def end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer, by a model's generation configuration and its tokenizer."""
    configured = generation_config.eos_token_id if generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
