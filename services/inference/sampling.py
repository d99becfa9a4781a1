"""Choosing the next token of each row: greedy, or by temperature and top-p with a generator for each answer.

Shapes: r rows, v vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampler:
    """How one answer is sampled; it draws from its own generator, so that the rest of the batch plays no part."""

    def __init__(self, *, temperature: float, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return float(torch.rand((), generator=self._generator))


class Score(NamedTuple):
    """A token's log-probability, and those of the likeliest tokens at its place, likeliest first, by token id.

    They are the model's own, before temperature and top-p, as OpenAI and TGI report them.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


def choose_tokens(logits_rv: Tensor, samplers: Sequence[Sampler | None], tops: Sequence[int]) -> list[Score]:
    """Pick each row's next token; None as a sampler stands for greedy. ``tops``: how many alternatives a row wants."""
    logprobs_rv = torch.log_softmax(logits_rv.float(), dim=-1)
    ids_r = logprobs_rv.argmax(dim=-1)
    sampled = [(row, sampler) for row, sampler in enumerate(samplers) if sampler is not None]
    if sampled:
        rows = [row for row, _ in sampled]
        ids_r[rows] = _sample(logprobs_rv[rows], [sampler for _, sampler in sampled])
    return score_tokens(logprobs_rv, ids_r, tops)


def score_tokens(logprobs_rv: Tensor, ids_r: Tensor, tops: Sequence[int]) -> list[Score]:
    """The scores of one given token of each row, with as many alternatives as ``tops`` says for the row."""
    chosen = logprobs_rv.gather(1, ids_r[:, None])[:, 0].tolist()
    most = min(max(tops, default=0), logprobs_rv.shape[1])
    if not most:
        return [Score(token_id, logprob, []) for token_id, logprob in zip(ids_r.tolist(), chosen, strict=True)]
    best = logprobs_rv.topk(most, dim=-1)
    rows = zip(ids_r.tolist(), chosen, best.indices.tolist(), best.values.tolist(), tops, strict=True)
    return [
        Score(token_id, logprob, list(zip(top_ids, top_logprobs, strict=True))[:top])
        for token_id, logprob, top_ids, top_logprobs, top in rows
    ]


def _sample(logprobs_rv: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Inverse-transform sampling from the smallest set of tokens whose probability reaches top-p."""
    columns = [(sampler.temperature, sampler.top_p, sampler.draw()) for sampler in samplers]
    temperature_r1, top_p_r1, draw_r1 = torch.tensor(columns, device=logprobs_rv.device)[..., None].unbind(dim=1)
    # The likeliest is at 0 and the temperature above 0, so that the coldest one cannot give infinity over infinity.
    scores_rv = (logprobs_rv - logprobs_rv.amax(dim=-1, keepdim=True)) / temperature_r1.clamp(min=1e-6)
    probabilities_rv, order_rv = torch.softmax(scores_rv, dim=-1).sort(dim=-1, descending=True)
    before_rv = probabilities_rv.cumsum(dim=-1) - probabilities_rv
    kept_rv = probabilities_rv.masked_fill(before_rv >= top_p_r1, 0.0)
    kept_rv[:, 0] = probabilities_rv[:, 0]
    reached_rv = kept_rv.cumsum(dim=-1)
    place_r1 = (reached_rv <= draw_r1 * reached_rv[:, -1:]).sum(dim=-1, keepdim=True)
    last_r1 = (kept_rv > 0).sum(dim=-1, keepdim=True) - 1
    return order_rv.gather(1, torch.minimum(place_r1, last_r1))[:, 0]
