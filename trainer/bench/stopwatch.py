"""CPU seconds that a training spends computing, whoever drives it: our loop, or a library's trainer."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import trainer.sft

# What is called for each step. The loss counts as forward pass: transformers' Trainer has the model compute it.
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


class Stopwatch:
    """``seconds`` holds CPU seconds of this process by part; of nested parts the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._busy = False

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch forward passes of that model, our loss, and every backward pass, clipping and optimiser's step."""
        with (
            patch.object(model, "forward", self._timed(FORWARD, model.forward)),
            patch.object(trainer.sft, "answer_loss", self._timed(FORWARD, trainer.sft.answer_loss)),
            patch.object(torch.Tensor, "backward", self._timed(BACKWARD, torch.Tensor.backward)),
            patch.object(torch.nn.utils, "clip_grad_norm_", self._timed(OPTIMIZER, torch.nn.utils.clip_grad_norm_)),
            patch.object(torch.optim.AdamW, "step", self._timed(OPTIMIZER, torch.optim.AdamW.step)),
        ):
            yield

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return call(*args, **kwargs)
            self._busy, began = True, time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._busy = False
                self.seconds[part] += time.process_time() - began
                self.steps += part == BACKWARD

        return timed
