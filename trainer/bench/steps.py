"""What a step of a client's training costs, and how much of it is not forward and backward passes.

A *visit* is all that a client does for one round in a process that has its model. Ours is measured beside visits as
OpenFedLLM (commit 14c6af2, arXiv 2402.06954) makes them: a new trainer, which tokenises the shard again, deep copies
of the adapter, and, as is its default, gradient checkpointing. All train the same model on the same batches' shapes.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainingArguments

from services.common.benchmarks import in_turns, spread
from trainer.batching import collate, encode_pairs
from trainer.bench.stopwatch import BACKWARD, FORWARD, OPTIMIZER, Stopwatch
from trainer.bench.visits import SEED, SHAPES, STEPS, Shape, message, prepare
from trainer.client_app import train_round
from trainer.config import RunConfig
from trainer.model import Trainee, load_trainee
from trainer.shards import read_pairs

WAYS = ("ours", "new trainer", "new trainer, checkpointing")


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each shape and way: CPU seconds a step, and shares of a visit, as spreads over the rounds."""
    for shape in SHAPES:
        yield from rows_of(shape, rounds)


def rows_of(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way, from visits of all ways in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainee = load_trainee(config := prepare(shape, Path(folder)))
        found = in_turns(WAYS, rounds, lambda way, number: visit(way, trainee, config, number))
    about = {
        "model": shape.name,
        "parameters": sum(p.numel() for p in trainee.model.parameters() if not p.requires_grad),
        "tokens": shape.tokens,
        "batch": shape.batch,
        "steps": STEPS,
        "visits": rounds,
    }
    for way, visits in found.items():
        spreads = {key: spread([one[key] for one in visits]) for key in visits[0]}
        print(
            f"{shape.name}, {way:<26} {spreads['cpu_seconds_per_step']['median']:.3f} CPU s a step, "
            f"{spreads['outside_share']['median']:.1%} outside forward and backward"
        )
        yield {**about, "way": way, **spreads}


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
        output_dir=str(config.run_dir), per_device_train_batch_size=config.batch_size, max_steps=STEPS,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch",
        activation_checkpointing=checkpointing, seed=SEED, use_cpu=True, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset.examples, data_collator=collated)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    copy.deepcopy(get_peft_model_state_dict(model))
    model.activation_checkpointing_disable()


def collated(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch for transformers' Trainer."""
    input_ids, labels = collate(examples, pad_id=0)
    return {"input_ids": input_ids, "labels": labels}
