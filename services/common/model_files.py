"""Where a service's language model comes from (the shipped miniature, a folder, the Hub), and its limits."""

import importlib.resources
from pathlib import Path
from typing import Any, NamedTuple

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


def context_tokens(config: Any) -> int:
    """The most tokens that prompt and answer may have together, by a transformers model configuration."""
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 2048))


def end_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer, by a model's generation configuration and its tokenizer."""
    configured = generation_config.eos_token_id if generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
