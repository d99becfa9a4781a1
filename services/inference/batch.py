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
from services.inference.sampling import Score, choose_tokens, score_tokens

# Prompts are read together while the padding stays below a quarter, and at most this many tokens at once.
PREFILL_TOKENS = 8192
# Most numbers in the logits of a prompt that is scored; a longer prompt is read in several parts.
SCORED_LOGITS = 2**25


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
        """Write one more token of every answer that is not over."""
        self.leave()
        rows = self._rows
        if rows is None:
            return
        rows.mask_rt = pad(rows.mask_rt, (0, 1), value=1)
        positions_r1 = rows.mask_rt.sum(dim=1, keepdim=True) - 1
        self._hand_out(rows, self._logits(rows.last_r[:, None], rows.mask_rt, positions_r1, rows.cache)[:, -1])

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
        ids_rt, positions_rt = ids_rt.to(device), positions_rt.to(device)
        if generations[0].scores_prompt:
            self._hand_out(rows, self._score_prompt(rows, ids_rt, positions_rt))
        else:
            self._hand_out(rows, self._logits(ids_rt, rows.mask_rt, positions_rt, rows.cache)[:, -1])
        return rows

    def _score_prompt(self, rows: Rows, ids_1t: Tensor, positions_1t: Tensor) -> Tensor:
        """Read a prompt that stands alone, score its tokens but for the first, and return the last logits (1, v)."""
        (generation,), width = rows.generations, ids_1t.shape[1]
        step = max(1, SCORED_LOGITS // self._network.config.get_text_config(decoder=True).vocab_size)
        scores: list[Score] = []
        for start in range(0, width, step):
            part = slice(start, min(start + step, width))
            logits_tv = self._logits(
                ids_1t[:, part], rows.mask_rt[:, : part.stop], positions_1t[:, part], rows.cache, keep=0
            )[0].float()
            following_t = ids_1t[0, part.start + 1 : part.stop + 1]  # the prompt's last token is followed by none
            logprobs_tv = torch.log_softmax(logits_tv[: len(following_t)], dim=-1)
            scores += score_tokens(logprobs_tv, following_t, [generation.top] * len(following_t))
        generation.accept_prompt(scores)
        return logits_tv[-1:]

    def _logits(
        self, ids_rt: Tensor, mask_rt: Tensor, positions_rt: Tensor, cache: DynamicCache, *, keep: int = 1
    ) -> Tensor:
        """Run the network over new columns; the logits (r, t, v) of the last ``keep`` columns, of all when it is 0."""
        output = self._network(
            input_ids=ids_rt,
            attention_mask=mask_rt,
            position_ids=positions_rt,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits
        return logits

    def _hand_out(self, rows: Rows, logits_rv: Tensor) -> None:
        """Choose each row's next token and give it to the row's answer."""
        generations = rows.generations
        scores = choose_tokens(logits_rv, [g.sampler for g in generations], [g.top for g in generations])
        wanted = [(g, score) for g, score in zip(generations, scores, strict=True) if not g.over]
        ROWS.observe(len(wanted))
        TOKENS.inc(len(wanted))
        for generation, score in wanted:
            generation.accept(score)
        rows.last_r = torch.tensor([score.token_id for score in scores], device=self._network.device)


def _widen(tensor: Tensor, width: int, *, dim: int) -> Tensor:
    """Pad with zeros at the beginning of one dimension."""
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _similar_lengths(generations: Sequence[Generation]) -> Iterator[list[Generation]]:
    """Split into groups whose prompts are of similar length, shortest first; scored prompts each stand alone."""
    yield from ([generation] for generation in generations if generation.scores_prompt)
    group: list[Generation] = []
    for generation in sorted((g for g in generations if not g.scores_prompt), key=lambda g: len(g.prompt_ids)):
        length = len(generation.prompt_ids)
        if group and (length > 8 + len(group[0].prompt_ids) * 1.33 or length * (len(group) + 1) > PREFILL_TOKENS):
            yield group
            group = []
        group.append(generation)
    if group:
        yield group
