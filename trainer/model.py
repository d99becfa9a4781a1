"""The model that is trained: a frozen base with a LoRA adapter, and the adapter as plain arrays.

Only the adapter moves between processes: ``{PEFT's parameter name: float32 array}``, sorted by name.
"""

import functools
import json
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from services.common.model_files import context_tokens, locate_model, weights_sha256
from services.contracts.errors import ConfigError
from trainer.aggregation import Arrays, check_arrays
from trainer.config import RunConfig

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraSettings:
    """What defines an adapter's shape and its starting values."""

    rank: int
    alpha: int
    dropout: float
    seed: int


@dataclass(frozen=True)
class Trainee:
    """A base model with a trainable adapter, its tokenizer, and what identifies the base.

    ``adapter`` is the adapter's values as they are, in the model's own memory, by PEFT's names: asking PEFT for them
    walks through the whole model. ``starting_adapter`` holds LoRA's initial values, which the seed decides: the adapter
    of round 0.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base_model_id: str
    base_model_sha256: str
    adapter: dict[str, torch.Tensor]
    starting_adapter: Arrays


def load_trainee(config: RunConfig) -> Trainee:
    """The model that a run trains; a process that trains several clients loads it once.

    Raises:
        ConfigError: the base model cannot be loaded, or its context is shorter than ``max-length``.
    """
    lora = LoraSettings(config.own_rank, config.lora_alpha, config.lora_dropout, config.seed)
    trainee = _load(config.base_model, lora)
    context = context_tokens(trainee.model.config)
    if config.max_length > context:
        raise ConfigError(
            f"max-length={config.max_length} is more than the context of {trainee.base_model_id}, {context} tokens"
        )
    return trainee


@functools.lru_cache(maxsize=1)
def _load(base_model: str | None, lora: LoraSettings) -> Trainee:
    # More threads than idle cores make a small model many times slower, so it is one unless the environment says more.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source, model_id = locate_model(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        base_sha256 = weights_sha256(source, cached_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base-model {source}: cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"base-model {source}: its tokenizer has no chat template")
    torch.manual_seed(lora.seed)  # LoRA's A matrices start at random; every process has to start at the same ones
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LINEAR_LAYERS,
        task_type=TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property by its former name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(base, wanted)
    adapter = dict(sorted(get_peft_model_state_dict(model).items()))
    return Trainee(model, tokenizer, model_id, base_sha256, adapter, _arrays(adapter))


def read_adapter_arrays(trainee: Trainee) -> Arrays:
    """A copy of the adapter's current values."""
    return _arrays(trainee.adapter)


def _arrays(adapter: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.cpu().numpy().copy() for name, tensor in adapter.items()}


def set_adapter_arrays(trainee: Trainee, arrays: Arrays) -> None:
    """Replace the adapter's values; raises AdapterError when names, shapes or dtypes do not fit."""
    check_arrays("the adapter to load", arrays, trainee.starting_adapter)
    for name, array in arrays.items():
        trainee.adapter[name].copy_(torch.tensor(array))


def adapter_config_json(trainee: Trainee) -> str:
    """PEFT's ``adapter_config.json`` for this adapter, without any path of this machine."""
    config: dict[str, Any] = trainee.model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = trainee.base_model_id
    config["inference_mode"] = True
    return json.dumps(config, indent=2, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"adapter config holds a {type(value).__name__}")
