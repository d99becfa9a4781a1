"""CPU seconds that a training spends computing, whoever drives it: our loop, or a library's trainer."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

# What is called for each step, in our loop as in transformers' Trainer. The loss is part of the forward pass.
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


class Stopwatch:
    """``seconds`` holds CPU seconds of this process by part; of nested parts the outermost counts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps = 0
        self._busy = False

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch forward passes of that model, and every loss, backward pass, clipping and optimiser's step."""
        step = torch.optim.AdamW.step
        with (
            patch.object(model, "forward", self._timed(FORWARD, model.forward)),
            patch.object(torch.nn.functional, "cross_entropy", self._timed(FORWARD, torch.nn.functional.cross_entropy)),
            patch.object(torch.Tensor, "backward", self._timed(BACKWARD, torch.Tensor.backward)),
            patch.object(torch.nn.utils, "clip_grad_norm_", self._timed(OPTIMIZER, torch.nn.utils.clip_grad_norm_)),
            patch.object(torch.optim.AdamW, "step", self._timed(OPTIMIZER, step)),
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
