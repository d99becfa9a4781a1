"""Supervised fine-tuning of an adapter: cross-entropy on answer tokens, clipped gradients, AdamW or plain SGD.

The loop is written out because it is the thing that is measured; ``tests/data/golden/sft.json`` pins its losses.
"""

import itertools
import math
import time
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from services.contracts.errors import DataError
from trainer.aggregation import Arrays
from trainer.batching import IGNORED, Dataset, batches_for_ever, collate
from trainer.local_rules import PLAIN, Gradients, LocalRule, trained_parameters
from trainer.model import Trainee

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class SftResult:
    """What one training did.

    Attributes:
        losses: mean loss per answer token of each step, before the step's update, in nats.
        loss: the mean over all answer tokens seen.
        num_tokens: answer tokens in one pass over the data, the weight in federated averaging.
        seconds: wall time.
        mean_gradient: the mean clipped gradient by the adapter's names, under a rule with a correction; else empty.
    """

    losses: tuple[float, ...]
    loss: float
    num_tokens: int
    seconds: float
    mean_gradient: Arrays = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many updates were made."""
        return len(self.losses)


def steps_for(dataset: Dataset, batch_size: int, epochs: int) -> int:
    """How many steps that many passes take."""
    return epochs * math.ceil(len(dataset.examples) / batch_size)


def train_sft(
    trainee: Trainee,
    dataset: Dataset,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    rule: LocalRule = PLAIN,
) -> SftResult:
    """Train the adapter in place, with a fresh optimiser and a constant learning rate.

    The same inputs and seed give the same losses on the same machine and thread count.

    Raises:
        DataError: there is nothing to train on, or the loss is not finite.
    """
    if not dataset.examples:
        raise DataError("no example is left to train on")
    started = time.perf_counter()
    torch.manual_seed(seed)  # for dropout
    model = trainee.model.train()
    pad_id = trainee.tokenizer.pad_token_id or 0
    losses: list[float] = []
    tokens: list[int] = []
    with trained_parameters(model, rule) as trained:
        optimizer = make_optimizer(list(trained.values()), rule, learning_rate)
        gradients = Gradients(trained, rule)
        for batch in itertools.islice(batches_for_ever(dataset.examples, batch_size, seed), steps):
            input_ids, labels = collate(batch, pad_id)
            loss = answer_loss(model(input_ids=input_ids, use_cache=False).logits, labels)
            if not torch.isfinite(loss):
                raise DataError(f"the loss is {loss.item()} at step {len(losses) + 1}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients.before_clipping()
            torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRADIENT_NORM)
            gradients.after_clipping()
            optimizer.step()
            losses.append(loss.item())
            tokens.append(sum(example.answer_length for example in batch))
    model.eval()
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    return SftResult(tuple(losses), mean, dataset.answer_tokens, time.perf_counter() - started, gradients.mean())


def make_optimizer(parameters: list[torch.nn.Parameter], rule: LocalRule, rate: float) -> torch.optim.Optimizer:
    """The rule's optimiser, without weight decay."""
    if rule.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens; the logits at a position predict the token after it.

    Args:
        logits: shape (batch, time, vocabulary).
        labels: shape (batch, time), ``IGNORED`` where no loss is wanted.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
