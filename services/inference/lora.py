"""Reading a LoRA adapter and merging it into the base model.

The merged network shares every parameter with the base except those that the adapter changes, for which it has its
own. So the base stays as it is, answers in work keep the weights they began with, and a step costs the same with and
without an adapter. The price is memory: a copy of the changed matrices for each loaded adapter.
Only plain LoRA on linear layers is taken (arXiv 2106.09685, PEFT's file format); whatever else a configuration asks
for is refused by name instead of being ignored.
"""

import copy
import io
import json
import math
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.contracts.adapters import CONFIG, WEIGHTS, check_config
from services.contracts.errors import AdapterError, AdapterHashMismatch

_PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight")
# Options of adapter_config.json that do not change the weights' meaning, or that are read here.
_KNOWN = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "bias",
    "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "peft_version", "megatron_core",
    "qalora_group_size", "auto_mapping", "ensure_weight_tying",
}  # fmt: skip


class _Config(NamedTuple):
    rank: int
    scale: float
    targets: str | list[str]


def merge_adapter(base: PreTrainedModel, directory: Path, expected_sha256: str) -> PreTrainedModel:
    """A network that answers as the base with this adapter; the base is not changed.

    Raises:
        AdapterHashMismatch: the weights or the configuration are not the ones that were promised.
        AdapterError: the configuration is not plain LoRA, or names, shapes, dtypes or values do not fit the base.
    """
    config, weights = _read_files(directory, expected_sha256)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    pairs = _pairs(directory, weights)
    wanted = {name for name in layers if _is_target(name, config.targets)}
    if set(pairs) != wanted:
        odd = sorted(set(pairs) ^ wanted)
        state = "has weights for" if odd[0] in pairs else "lacks weights for"
        raise AdapterError(f"adapter {directory} {state} {odd[0]} (and {len(odd) - 1} more), unlike its target_modules")
    changed = {}
    for name, (a_ri, b_or) in pairs.items():
        weight_oi = layers[name].weight
        _check_shapes(directory, name, a_ri, b_or, weight_oi, config.rank)
        delta_oi = config.scale * (b_or.to(weight_oi.device, torch.float32) @ a_ri.to(weight_oi.device, torch.float32))
        changed[name] = (weight_oi.float() + delta_oi).to(weight_oi.dtype)
        if not bool(changed[name].isfinite().all()):
            raise AdapterError(f"adapter {directory}: {name} becomes NaN or infinite")
    return _with_weights(base, changed)


def _read_files(directory: Path, expected_sha256: str) -> tuple[_Config, dict[str, Tensor]]:
    """Both files, checked here again: these very bytes are used, whatever became of them since the manifest's check."""
    content, config = (directory / WEIGHTS).read_bytes(), (directory / CONFIG).read_bytes()
    if sha256(content).hexdigest() != expected_sha256:
        raise AdapterHashMismatch(f"adapter {directory}: {WEIGHTS} changed while it was read")
    check_config(directory, io.BytesIO(content), config)
    try:
        return _parse_config(directory / CONFIG, config), load(content)
    except SafetensorError as error:
        raise AdapterError(f"adapter {directory}: {WEIGHTS} is not a safetensors file: {error}") from error


def _parse_config(path: Path, content: bytes) -> _Config:
    try:
        values: dict[str, Any] = dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none":
        raise AdapterError(f"{path}: only LoRA adapters without trained biases can be served")
    unknown = sorted(name for name, value in values.items() if value and name not in _KNOWN)
    if unknown:
        raise AdapterError(f"{path}: cannot serve an adapter with {', '.join(unknown)}")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise AdapterError(f"{path}: init_lora_weights={values['init_lora_weights']} changes the base model")
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: r must be a whole number from 1 and lora_alpha a number")
    if not isinstance(targets, str | list) or not targets:
        raise AdapterError(f"{path}: target_modules must be a list of names or a pattern")
    return _Config(rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank), targets)


def _pairs(directory: Path, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The A and B matrices of each layer, by the layer's name in the base model."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        match = _NAME.fullmatch(key)
        if match is None:
            raise AdapterError(f"adapter {directory}: {key} is not the name of a LoRA weight")
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise AdapterError(f"adapter {directory}: {key} ({tensor.dtype}) holds values that are not finite numbers")
        halves.setdefault(match[1], {})[match[2]] = tensor
    single = next((name for name, half in halves.items() if len(half) != 2), None)
    if single or not halves:
        raise AdapterError(f"adapter {directory}: {single or 'every layer'} lacks its lora_A or lora_B weight")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a pattern fits the whole name, a list's entry the name or its end."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise AdapterError(f"{CONFIG}: target_modules is not a pattern: {error}") from error
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_shapes(directory: Path, name: str, a_ri: Tensor, b_or: Tensor, weight_oi: Tensor, rank: int) -> None:
    outputs, inputs = weight_oi.shape
    for half, found, wanted in (("A", a_ri.shape, (rank, inputs)), ("B", b_or.shape, (outputs, rank))):
        if tuple(found) != wanted:
            raise AdapterError(
                f"adapter {directory}: {name}.lora_{half} has shape {tuple(found)}; the base model needs {wanted}"
            )


def _with_weights(base: PreTrainedModel, changed: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of the network that shares the base's parameters and buffers, with some layers' weights replaced."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    network = copy.deepcopy(base, shared)
    for name, weight_oi in changed.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(weight_oi, requires_grad=False)
    return network
