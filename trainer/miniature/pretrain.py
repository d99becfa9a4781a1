"""Pretraining of the miniature model on the CPU: tokenizer, model, training loop, files.

The run stops on a number of steps and not on time, so that the same seed and data give the same weights on the same
software. Tensor names end in their shape: b batch, t time (tokens), h hidden, n selected positions, v vocabulary.
"""

import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from services.contracts.errors import ConfigError
from trainer.miniature.sources import load_sources
from trainer.miniature.tasks import Example, examples
from trainer.miniature.tokenizer import ASSISTANT, BOS, EOS, PAD, USER, encode_text, save_tokenizer, train_tokenizer

MAX_TOKENS = 320
TOKENIZER_EXAMPLES = 40_000
SHARD_EXAMPLES = 8_192
TOKENS_PER_BATCH = 3_072
LETTER_WEIGHT = 6.0  # the one letter of a preference would drown among the words of the other tasks

GENERATION: dict[str, object] = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "do_sample": False,
    "max_new_tokens": 48,
}


@dataclass(frozen=True)
class Recipe:
    """What a run depends on; it is written beside the weights."""

    steps: int
    seed: int = 0
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 512
    vocabulary: int = 4_096
    context: int = 512
    peak_rate: float = 3e-3
    warm_up: int = 60
    final_share: float = 0.05
    prompt_weight: float = 0.2
    processes: int = 2

    def __post_init__(self) -> None:
        if self.steps <= self.warm_up:
            raise ConfigError(f"--steps must be more than the warm-up of {self.warm_up} steps, not {self.steps}")

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step: linear warm-up, then a cosine down to ``final_share`` of the peak."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak_rate * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


class Encoded(NamedTuple):
    """Token ids of one dialogue, and the weight of each token in the loss."""

    ids: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """Right-padded ids and loss weights; padding weighs nothing. ``total`` is the weight of all processes' shares."""

    ids_bt: torch.Tensor
    weights_bt: torch.Tensor
    total: float


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A fresh model, its weights drawn with the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def build_optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Muon (Jordan et al. 2024, in torch since 2.9) reached in 350 steps a held-out loss that AdamW alone needs about a
    third more steps for, at the same cost a step; its rate is scaled so that AdamW's value fits.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.peak_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.peak_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def encode(tokenizer: Tokenizer, shard: Sequence[Example], prompt_weight: float) -> list[Encoded]:
    """Dialogues as ids; those longer than ``MAX_TOKENS`` are left out."""
    pieces = iter(encode_text(tokenizer, [turn for example in shard for turn in example.turns]))
    found: list[Encoded] = []
    for example in shard:
        ids, weights = [BOS], [0.0]
        answer_weight = LETTER_WEIGHT if example.kind == "preference" else 1.0
        for index, _ in enumerate(example.turns):
            piece = next(pieces)
            if index % 2 == 0:
                ids += [USER, *piece, ASSISTANT]
                weights += [0.0, *[prompt_weight] * len(piece), 0.0]
            else:
                ids += [*piece, EOS]
                weights += [answer_weight] * (len(piece) + 1)
        if len(ids) <= MAX_TOKENS:
            found.append(Encoded(ids, weights))
    return found


def batches(tokenizer: Tokenizer, recipe: Recipe, data: Path | None, rank: int = 0) -> Iterator[Batch]:
    """One process's share of an endless stream of batches of like length, of at most ``TOKENS_PER_BATCH`` tokens.

    The stream is the same for any number of processes: each takes every n-th dialogue of every batch.
    """
    stream = examples(f"pretrain-{recipe.seed}", data)
    rng = random.Random(recipe.seed)
    while True:
        shard = sorted(
            encode(tokenizer, list(islice(stream, SHARD_EXAMPLES)), recipe.prompt_weight), key=lambda s: len(s.ids)
        )
        groups: list[list[Encoded]] = [[]]
        for sequence in shard:
            if len(sequence.ids) * (len(groups[-1]) + 1) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(sequence)
        if len(groups[-1]) < recipe.processes:
            groups.pop()  # the shard's last batch may hold a single dialogue, too few to share
        rng.shuffle(groups)
        yield from (_share(group, rank, recipe.processes) for group in groups)


def _share(group: Sequence[Encoded], rank: int, processes: int) -> Batch:
    length, share = max(len(sequence.ids) for sequence in group), group[rank::processes]
    ids = [s.ids + [PAD] * (length - len(s.ids)) for s in share]
    weights = [s.weights + [0.0] * (length - len(s.weights)) for s in share]
    return Batch(torch.tensor(ids), torch.tensor(weights), sum(sum(s.weights) for s in group))


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """This share's part of the batch's weighted mean cross-entropy; logits only where a weight is not zero."""
    hidden_bth = model.model(input_ids=batch.ids_bt, use_cache=False).last_hidden_state
    weights_bt = batch.weights_bt[:, 1:]
    chosen_bt = weights_bt > 0
    logits_nv = model.lm_head(hidden_bth[:, :-1][chosen_bt])
    losses_n = functional.cross_entropy(logits_nv, batch.ids_bt[:, 1:][chosen_bt], reduction="none")
    return (losses_n * weights_bt[chosen_bt]).sum() / batch.total


def pretrain(recipe: Recipe, out: Path, data: Path | None) -> None:
    """Train a model by ``recipe`` and write it to ``out``, all files at once at the end.

    Two processes with one thread each keep two cores busier than one process with two threads, most of all when
    something else runs on the machine: they wait for each other once a step instead of at every operation.
    """
    vocabulary = _tokenizer(recipe, data).to_str()
    with tempfile.TemporaryDirectory() as meeting_point:
        arguments = (recipe, out, data, vocabulary, f"file://{meeting_point}/processes")
        if recipe.processes == 1:
            _train(0, *arguments)
        else:
            spawn(_train, arguments, nprocs=recipe.processes)  # type: ignore[no-untyped-call]


def _train(rank: int, recipe: Recipe, out: Path, data: Path | None, vocabulary: str, meeting_point: str) -> None:
    """The training loop of one process; the first one shows progress and writes the files."""
    torch.set_num_threads(1)
    if recipe.processes > 1:
        distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=recipe.processes)
    tokenizer = Tokenizer.from_str(vocabulary)
    model = build_model(recipe)
    optimisers = build_optimisers(model, recipe)
    tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
    with _progress(visible=rank == 0) as progress:
        task = progress.add_task("pretraining", total=recipe.steps, loss=float("nan"))
        for step, batch in enumerate(islice(batches(tokenizer, recipe, data, rank), recipe.steps)):
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = recipe.rate(step)
            loss = weighted_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            _add_up_gradients(model, recipe.processes)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            tokens += batch.ids_bt.numel() * recipe.processes
            progress.update(task, advance=1, loss=loss.item() * recipe.processes)
            if step % 100 == 99 and rank == 0 and not progress.console.is_terminal:
                rate = tokens / (time.perf_counter() - wall)
                progress.console.print(f"step {step + 1}/{recipe.steps} {rate:.0f} tokens/s")
    if rank == 0:
        record = {
            "tokens": tokens,
            "wall_minutes": round((time.perf_counter() - wall) / 60, 1),
            "cpu_minutes": round((time.process_time() - cpu) / 60 * recipe.processes, 1),
            "sources": [source._asdict() for source in load_sources(data).records],
        }
        save(model, tokenizer, recipe, out, record)


def _add_up_gradients(model: LlamaForCausalLM, processes: int) -> None:
    """Replace every gradient by its sum over the processes."""
    if processes == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    for gradient, summed in zip(gradients, torch.split(together, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, out: Path, record: dict[str, object]) -> None:
    """Write weights in float16, configuration, tokenizer and ``training.json`` to ``out``, file by file atomically."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        torch.nn.Module.half(model)
        model.save_pretrained(folder)
        _write_json(folder / "generation_config.json", GENERATION)
        save_tokenizer(tokenizer, folder, recipe.context)
        _write_json(folder / "training.json", {"recipe": asdict(recipe), **record})
        for path in folder.iterdir():
            path.chmod(0o644)
            path.replace(out / path.name)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokenizer(recipe: Recipe, data: Path | None) -> Tokenizer:
    stream = islice(examples(f"tokenizer-{recipe.seed}", data), TOKENIZER_EXAMPLES)
    texts = (turn for example in stream for turn in example.turns)
    return train_tokenizer(texts, recipe.vocabulary)


def _progress(*, visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not visible,
    )
