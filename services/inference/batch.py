"""The decode loop: answers that one model writes together, with left padding and a cache of keys and values.

Answers join and leave between steps. Those that join are read ("prefilled") on their own, and their cache is put
beside the others', padded on the left to a common width; a row's positions count only its own tokens, so that the
padding changes nothing but the last bits of rounding.

Shapes: r rows, t columns of the cache, h heads, d width of a head, v vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from services.inference.generation import Generation
from services.inference.metrics import ROWS, TOKENS
from services.inference.sampling import choose_tokens

# Prompts are read together while the padding stays below a quarter, and at most this many tokens at once.
PREFILL_TOKENS = 8192


@dataclass
class Rows:
    """Answers in work: ``mask_rt`` is 1 at a row's own tokens; ``last_r`` is each row's newest, unread token."""

    generations: list[Generation]
    mask_rt: Tensor
    last_r: Tensor
    cache: DynamicCache

    def select(self, kept: list[int]) -> None:
        """Keep only these rows, and cut off the columns that are padding in all of them."""
        self.generations = [self.generations[row] for row in kept]
        rows = torch.tensor(kept, device=self.mask_rt.device)
        self.last_r = self.last_r[rows]
        mask_rt = self.mask_rt[rows]
        first = int(mask_rt.any(dim=0).int().argmax()) if kept else 0
        self.mask_rt = mask_rt[:, first:]
        for layer in _layers(self.cache):
            layer.keys = layer.keys[rows, :, first:]
            layer.values = layer.values[rows, :, first:]

    def join(self, other: "Rows") -> None:
        """Put another block of rows below this one."""
        width = max(self.mask_rt.shape[1], other.mask_rt.shape[1])
        self.generations = self.generations + other.generations
        self.mask_rt = torch.cat([_widen(block.mask_rt, width, dim=1) for block in (self, other)])
        self.last_r = torch.cat([self.last_r, other.last_r])
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            mine.keys = torch.cat([_widen(layer.keys, width, dim=2) for layer in (mine, theirs)])
            mine.values = torch.cat([_widen(layer.values, width, dim=2) for layer in (mine, theirs)])


class _Layer(Protocol):
    """One layer of the cache; both tensors are (r, h, t, d)."""

    keys: Tensor
    values: Tensor


def _layers(cache: DynamicCache) -> list[_Layer]:
    return cast(list[_Layer], cache.layers)


class Batch:
    """The answers that one network is writing. Used by one thread only."""

    def __init__(self, network: PreTrainedModel) -> None:
        self._network = network
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._rows.generations) if self._rows else 0

    @property
    def generations(self) -> list[Generation]:
        """The answers in work."""
        return list(self._rows.generations) if self._rows else []

    @torch.inference_mode()
    def leave(self) -> None:
        """Let ended and cancelled answers go, which frees their places."""
        if self._rows is None:
            return
        kept = [row for row, generation in enumerate(self._rows.generations) if not generation.over]
        if not kept:
            self._rows = None
        elif len(kept) < len(self):
            self._rows.select(kept)

    @torch.inference_mode()
    def admit(self, generations: Sequence[Generation]) -> None:
        """Read the prompts of new answers, write their first tokens, and let them join."""
        for group in _similar_lengths(generations):
            rows = self._prefill(group)
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more token of every answer."""
        rows = self._rows
        if rows is None:
            return
        rows.mask_rt = pad(rows.mask_rt, (0, 1), value=1)
        positions_r1 = rows.mask_rt.sum(dim=1, keepdim=True) - 1
        rows.last_r = self._forward(rows, rows.last_r[:, None], positions_r1)

    def _prefill(self, generations: list[Generation]) -> Rows:
        device = self._network.device
        width = max(len(generation.prompt_ids) for generation in generations)
        ids_rt = torch.zeros(len(generations), width, dtype=torch.long)
        mask_rt = torch.zeros_like(ids_rt)
        for row, generation in enumerate(generations):
            start = width - len(generation.prompt_ids)
            ids_rt[row, start:] = torch.tensor(generation.prompt_ids)
            mask_rt[row, start:] = 1
        positions_rt = (mask_rt.cumsum(dim=1) - 1).clamp(min=0)
        # Without a config: full-length cache layers, also for models with sliding windows (their mask still slides).
        rows = Rows(generations, mask_rt.to(device), ids_rt[:, -1].to(device), DynamicCache())
        rows.last_r = self._forward(rows, ids_rt.to(device), positions_rt.to(device))
        return rows

    def _forward(self, rows: Rows, ids_rt: Tensor, positions_rt: Tensor) -> Tensor:
        """Run the network over new columns, hand out each row's next token, and return these tokens."""
        output = self._network(
            input_ids=ids_rt,
            attention_mask=rows.mask_rt,
            position_ids=positions_rt,
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = choose_tokens(output.logits[:, -1], [generation.sampler for generation in rows.generations])
        ROWS.observe(len(chosen.ids))
        TOKENS.inc(len(chosen.ids))
        for generation, token_id, logprob in zip(rows.generations, chosen.ids, chosen.logprobs, strict=True):
            generation.accept(token_id, logprob)
        return torch.tensor(chosen.ids, device=self._network.device)


def _widen(tensor: Tensor, width: int, *, dim: int) -> Tensor:
    """Pad with zeros at the beginning of one dimension."""
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _similar_lengths(generations: Sequence[Generation]) -> Iterator[list[Generation]]:
    """Split into groups whose prompts are of similar length, shortest first."""
    group: list[Generation] = []
    for generation in sorted(generations, key=lambda g: len(g.prompt_ids)):
        length = len(generation.prompt_ids)
        if group and (length > 8 + len(group[0].prompt_ids) * 1.33 or length * (len(group) + 1) > PREFILL_TOKENS):
            yield group
            group = []
        group.append(generation)
    if group:
        yield group
