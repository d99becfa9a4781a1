"""What a step of a client's training costs, and how much of it is not forward and backward passes.

A *visit* is all that a client does for one round in a process that has its model. Ours is measured beside visits as
OpenFedLLM 14c6af2 makes them (arXiv 2402.06954): a new trainer a visit, which tokenises the shard again, deep copies
of the adapter, and, as is its default, gradient checkpointing. All train the same model on the same batches' shapes.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from services.common.benchmarks import spread
from services.common.model_files import locate_model
from trainer.batching import collate, encode_pairs
from trainer.bench.stopwatch import BACKWARD, FORWARD, OPTIMIZER, Stopwatch
from trainer.client_app import train_round
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.files import write_atomically
from trainer.model import Trainee, load_trainee
from trainer.shards import Pair, read_pairs

BATCH, STEPS = 4, 10  # of a visit: those at which OpenFedLLM was measured
SEED = 0
WAYS = ("ours", "new trainer", "new trainer, checkpointing")


class Shape(NamedTuple):
    """A model, and the length of every example."""

    name: str
    tokens: int
    sizes: dict[str, int] | None  # of a random Llama; None: the shipped miniature


SHAPES = (
    Shape("miniature", 128, None),
    Shape("random Llama, 28 million parameters", 256, {"hidden_size": 512, "intermediate_size": 1408, "layers": 8}),
)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each shape and way: CPU seconds a step, and shares of a visit, as spreads over the rounds."""
    return [row for shape in SHAPES for row in measure_shape(shape, rounds)]


def measure_shape(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """Visits of all ways in turns, the order turning with the round; the first round is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(shape, Path(folder))
        trainee = load_trainee(config)
        parameters = sum(parameter.numel() for parameter in trainee.model.get_base_model().parameters())
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):
            for place in range(len(WAYS)):
                way = WAYS[(place + number) % len(WAYS)]
                figures = visit(way, trainee, config, number)
                if number:
                    found[way].append(figures)
        for way, visits in found.items():
            figures = {key: spread([one[key] for one in visits]) for key in visits[0]}
            print(
                f"{shape.name}, {way:<27} {figures['cpu_seconds_per_step']['median']:.3f} CPU s a step, "
                f"{figures['outside_share']['median']:.1%} outside forward and backward"
            )
            yield {
                "model": shape.name, "parameters": parameters, "tokens": shape.tokens, "batch": BATCH, "steps": STEPS,
                "way": way, "visits": rounds, **figures,
            }  # fmt: skip


def prepare(shape: Shape, folder: Path) -> RunConfig:
    """A model and a shard whose examples all have the shape's length, so that no way pads more than another."""
    miniature = locate_model(None).location
    model = ""
    if shape.sizes:
        model = str(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(miniature)
        tokenizer.save_pretrained(model)
        torch.manual_seed(SEED)
        settings = dict(shape.sizes)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                num_hidden_layers=settings.pop("layers"),
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                **settings,
            )
        ).save_pretrained(model)
    pairs = [
        Pair(prompt=f"Count on from {n}.", response=" ".join(str(n + i) for i in range(shape.tokens)))
        for n in range(BATCH * STEPS)
    ]
    write_atomically(folder / "shard.jsonl", "".join(pair.model_dump_json() + "\n" for pair in pairs))
    return parse_run_config(
        default_run_config(Path("pyproject.toml"))
        | {
            "run-dir": str(folder / "run"), "arm": "none", "base-model": model, "seed": SEED, "batch-size": BATCH,
            "max-length": shape.tokens, "shard-data": str(folder / "shard.jsonl"), "learning-rate": 1e-4,
            "num-clients": 1, "clients-per-round": 1, "min-clients": 1,
        }
    )  # fmt: skip


def visit(way: str, trainee: Trainee, config: RunConfig, number: int) -> dict[str, float]:
    """One visit; gives CPU seconds per step, and the shares of all CPU time outside of what the step is for."""
    order = message(trainee, number)  # made by the coordinator, so not part of the visit
    watch = Stopwatch()
    gc.collect()
    with watch.watching(trainee.model):
        began = time.process_time()
        if way == "ours":
            train_round(order, config, 0)
        else:
            train_as_openfedllm(trainee, config, checkpointing="checkpointing" in way)
        whole = time.process_time() - began
    if watch.steps != STEPS:
        raise AssertionError(f"{way}: {watch.steps} steps instead of {STEPS}")
    passes = watch.seconds[FORWARD] + watch.seconds[BACKWARD]
    return {
        "cpu_seconds_per_step": whole / STEPS,
        "outside_share": 1 - passes / whole,
        "outside_and_not_optimizer_share": 1 - (passes + watch.seconds[OPTIMIZER]) / whole,
    }


def message(trainee: Trainee, number: int) -> RecordDict:
    """What the coordinator sends a client for a round."""
    arrays = ArrayRecord({name: Array(array) for name, array in trainee.starting_adapter.items()})
    order = ConfigRecord({"round": number + 1, "base-model-sha256": trainee.base_model_sha256, "last-counted": 0})
    return RecordDict({"arrays": arrays, "config": order})


def train_as_openfedllm(trainee: Trainee, config: RunConfig, *, checkpointing: bool) -> None:
    """A client's visit as in OpenFedLLM's ``main_sft.py``, with transformers' own Trainer and our data.

    The adapter's copies, the tokenising and the new trainer are theirs. Files, logs and progress bars are off.
    """
    model, tokenizer = trainee.model, trainee.tokenizer
    model.config.use_cache = False
    tensors = {name: torch.from_numpy(np.copy(array)) for name, array in trainee.starting_adapter.items()}
    set_peft_model_state_dict(model, tensors)
    dataset = encode_pairs(read_pairs(Path(str(config.shard_data))), tokenizer, config.max_length)
    arguments = TrainingArguments(
        output_dir=str(config.run_dir), per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch",
        gradient_checkpointing=checkpointing, seed=SEED, use_cpu=True, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset.examples, data_collator=collated)
    trainer.train()
    copy.deepcopy(get_peft_model_state_dict(model))
    model.gradient_checkpointing_disable()


def collated(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch for transformers' Trainer."""
    input_ids, labels = collate(examples, pad_id=0)
    return {"input_ids": input_ids, "labels": labels}
