"""Training the encoder tier: a LoRA adapter and one linear layer of heads on a frozen sentence encoder.

LoRA is that of Hu et al. 2021 (https://arxiv.org/abs/2106.09685), by peft. All heads are trained together: each text
teaches those heads for which it has a label, and its classes weigh the same for each head.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import BertModel

from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory
from services.safety.embedded.encoder import load_tokenizer
from services.safety.embedded.scores import HEADS
from services.safety.training.samples import Sample

LORA_MODULES = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
CATEGORIES = list(HazardCategory)
SMOOTHED = (0.02, 0.98)  # the targets for False and True: some labels are wrong, and none is worth certainty
CATEGORY_WEIGHT = 2.0  # of all category heads together, in heads
BUCKET_BATCHES = 50  # batches are cut from so many batches' worth of texts, sorted by length
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """How the encoder is trained. Learning rates are AdamW's; the head learns twice as fast as the adapter.

    ``bfloat16`` computes the forward and backward passes in that type, which takes half the time on CPUs that have
    it and far more on those that do not.
    """

    seed: int = 0
    epochs: float = 2.0
    batch: int = 32
    learning_rate: float = 1e-3
    rank: int = 16
    max_tokens: int = 96
    warm_up_steps: int = 100
    bfloat16: bool = False


class EncoderWithHeads(nn.Module):
    """BERT with a LoRA adapter, mean pooling, and K heads (`HEADS`, then the hazard categories)."""

    def __init__(self, base: Path, rank: int) -> None:
        super().__init__()
        bert = BertModel.from_pretrained(base, add_pooling_layer=False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_MODULES)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property by its former name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            self.encoder = get_peft_model(bert, config)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(bert.config.hidden_size, len(HEADS) + len(CATEGORIES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (n, K) of token ids (n, t) with their padding mask (n, t), float."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits

    def tensors(self) -> dict[str, npt.NDArray[np.float16]]:
        """What is trained, by the names that :mod:`services.safety.embedded.encoder` reads."""
        found: dict[str, npt.NDArray[np.float16]] = {}
        for name, value in self.state_dict().items():
            if ".lora_" in name:
                short = name.removeprefix("encoder.base_model.model.").replace(".default.weight", "")
                found[short] = value.half().numpy()
            elif name.startswith("head."):
                found[name] = value.half().numpy()
        return found

    def load(self, tensors: Mapping[str, npt.NDArray[np.float16]]) -> None:
        """Take over what :meth:`tensors` gave of a model of the same rank; raises ConfigError when it does not fit."""
        own = {name: value.shape for name, value in self.tensors().items()}
        if own != {name: value.shape for name, value in tensors.items()}:
            raise ConfigError("the adapter to start from has other tensors than an adapter of this version and rank")
        state = {
            name if name.startswith("head.") else f"encoder.base_model.model.{name}.default.weight": torch.from_numpy(
                value.astype(np.float32)
            )
            for name, value in tensors.items()
        }
        self.load_state_dict(state, strict=False)


def fit(
    samples: Sequence[Sample],
    base: Path,
    recipe: Recipe,
    start: Mapping[str, npt.NDArray[np.float16]] | None = None,
) -> EncoderWithHeads:
    """Train on all samples; the same samples, recipe and library versions give the same weights.

    Args:
        samples: what to learn from.
        base: the folder of the frozen encoder.
        recipe: how to learn.
        start: the tensors of an adapter and heads to go on from, of the recipe's rank; fresh ones by default.
    """
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = load_tokenizer(base, recipe.max_tokens)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch([sample.text for sample in samples])]
    targets, weights = labels(samples)
    model = EncoderWithHeads(base, recipe.rank)
    if start is not None:
        model.load(start)
    model.train()
    steps = max(1, round(recipe.epochs * len(samples) / recipe.batch))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, schedule = _optimiser(model, recipe, steps)
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for step, chosen in enumerate(batches([len(ids) for ids in tokens], recipe.batch, rng)):
            if step == steps:
                break
            ids, mask = pad([tokens[i] for i in chosen])
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                logits = model(ids, mask).float()
            loss = _loss(logits, torch.from_numpy(targets[chosen]), torch.from_numpy(weights[chosen]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
    model.eval()
    return model


def labels(samples: Sequence[Sample]) -> tuple[Floats, Floats]:
    """Targets and weights (n, K); a weight of 0 marks an unknown label. Both classes of a head weigh the same."""
    table = np.full((len(samples), len(HEADS) + len(CATEGORIES)), np.nan, np.float32)
    table[:, : len(HEADS)] = np.array([[s.asks, s.harmful, s.declines] for s in samples], np.float32)  # None is nan
    for number, sample in enumerate(samples):
        if sample.category is not None:
            table[number, len(HEADS) :] = [sample.category is category for category in CATEGORIES]
        elif sample.harmless:
            table[number, len(HEADS) :] = 0.0
    weights = np.array([sample.weight for sample in samples], np.float32)[:, None] * ~np.isnan(table)
    for head in range(len(HEADS)):
        yes, no = table[:, head] == 1, table[:, head] == 0
        for rows, share in ((yes, weights[yes, head].sum()), (no, weights[no, head].sum())):
            weights[rows, head] *= weights[:, head].sum() / (2 * share) if share else 1.0
    weights[:, len(HEADS) :] *= CATEGORY_WEIGHT / len(CATEGORIES)
    return np.nan_to_num(table), weights.astype(np.float32)


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of indices: texts of like length together, so that little is padding; each once an epoch."""
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = sorted(order[start : start + size * BUCKET_BATCHES], key=lambda i: lengths[i])
            cut = [bucket[i : i + size] for i in range(0, len(bucket), size)]
            yield from rng.sample(cut, len(cut))


def pad(tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (n, t) int64 and their mask (n, t) float32."""
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1.0
    return ids, mask


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    low, high = SMOOTHED
    losses = binary_cross_entropy_with_logits(logits, low + (high - low) * targets, reduction="none")
    return (losses * weights).sum() / len(logits)


def _optimiser(
    model: EncoderWithHeads, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    adapter = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": adapter, "lr": recipe.learning_rate},
        {"params": model.head.parameters(), "lr": 2 * recipe.learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    rise, fall = recipe.warm_up_steps, max(1, steps - recipe.warm_up_steps)

    def share(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (steps - step) / fall))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, share)
