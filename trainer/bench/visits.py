"""A client's visit to be measured: the model, the shard, and the coordinator's message."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from services.common.model_files import locate_model
from trainer.bundle import installed_versions
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.exchange import write_order
from trainer.files import write_atomically
from trainer.model import Trainee
from trainer.shards import Pair

STEPS, SEED = 10, 0


class Shape(NamedTuple):
    """A model, the size of a batch, and the length of every example."""

    name: str
    batch: int
    tokens: int
    sizes: dict[str, Any] | None  # of a random Llama; None: the shipped miniature


SHAPES = (  # the first is about that at which OpenFedLLM was measured
    Shape("miniature", 4, 128, None),
    Shape("random Llama", 1, 256, {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}),
)


def prepare(shape: Shape, folder: Path) -> RunConfig:
    """A model and a shard whose examples all have the shape's length, so that no way pads more than another."""
    miniature = locate_model(None).location
    model = ""
    if shape.sizes:
        model = str(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(miniature)
        tokenizer.save_pretrained(model)
        torch.manual_seed(SEED)
        sizes = LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
            tie_word_embeddings=True, **shape.sizes,
        )  # fmt: skip
        LlamaForCausalLM(sizes).save_pretrained(model)
    pairs = [
        Pair(prompt=f"Count on from {n}.", response=" ".join(str(n + i) for i in range(shape.tokens)))
        for n in range(shape.batch * STEPS)
    ]
    write_atomically(folder / "shard.jsonl", "".join(pair.model_dump_json() + "\n" for pair in pairs))
    return parse_run_config(
        default_run_config(Path("pyproject.toml"))
        | {
            "run-dir": str(folder / "run"), "arm": "none", "base-model": model, "seed": SEED, "batch-size": shape.batch,
            "max-length": shape.tokens, "shard-data": str(folder / "shard.jsonl"), "learning-rate": 1e-4,
            "num-clients": 1, "clients-per-round": 1, "min-clients": 1,
        }
    )  # fmt: skip


def message(trainee: Trainee, number: int) -> RecordDict:
    """What the coordinator sends a client for a round."""
    arrays = ArrayRecord({name: Array(array) for name, array in trainee.starting_adapter.items()})
    order = write_order(number + 1, trainee.base_model_sha256, installed_versions(), last_counted=0)
    return RecordDict({"arrays": arrays, "config": order})
