"""What a strategy changes about local training: which parts are trained, and what is done to their gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.aggregation import Arrays
from trainer.lora import A_SUFFIX


@dataclass(frozen=True)
class LocalRule:
    """How to train; the default is plain fine-tuning with AdamW.

    Attributes:
        optimizer: ``sgd`` is without momentum.
        b_only: LoRA's A matrices stay as they are.
        trained_rank: components from this one on stay as they are; None when all are trained.
        proximal_mu: FedProx's pull towards the starting point.
        correction: SCAFFOLD's c - c_i by the adapter's names, added to each gradient.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    b_only: bool = False
    trained_rank: int | None = None
    proximal_mu: float = 0.0
    correction: Arrays | None = None


PLAIN = LocalRule()


@contextmanager
def trained_parameters(model: torch.nn.Module, rule: LocalRule) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The parameters that a rule trains, by the adapter's names; the others need no gradient meanwhile."""
    adapter = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [p for name, p in adapter.items() if rule.b_only and name.endswith(A_SUFFIX)]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield {name: p for name, p in adapter.items() if p.requires_grad}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class Gradients:
    """The gradients of one training as its rule wants them, between ``backward`` and the optimiser's step."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter], rule: LocalRule) -> None:
        self._trained, self._rule = trained, rule
        self._start = {name: p.detach().clone() for name, p in trained.items()} if rule.proximal_mu else {}
        self._correction = {name: torch.from_numpy(array) for name, array in (rule.correction or {}).items()}
        self._sum = {name: torch.zeros_like(self._trained[name]) for name in self._correction}
        self._steps = 0

    def before_clipping(self) -> None:
        """Add what belongs to the loss, and clear what is not trained."""
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            if self._rule.proximal_mu:
                parameter.grad.add_(parameter.detach() - self._start[name], alpha=self._rule.proximal_mu)
            if self._rule.trained_rank is not None:
                rank = self._rule.trained_rank
                (parameter.grad[rank:] if name.endswith(A_SUFFIX) else parameter.grad[:, rank:]).zero_()

    def after_clipping(self) -> None:
        """Take note of the gradient, then correct it."""
        self._steps += 1
        for name, correction in self._correction.items():
            gradient = self._trained[name].grad
            if gradient is not None:
                self._sum[name].add_(gradient)
                gradient.add_(correction)

    def mean(self) -> Arrays:
        """The mean of the gradients before their correction: SCAFFOLD's new c_i. Empty without a correction."""
        return {name: (total / self._steps).numpy() for name, total in self._sum.items()}
