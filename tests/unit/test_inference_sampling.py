"""The next token: greedy, and sampled with a generator of its own for each answer."""

import math

import pytest
import torch

from services.inference.sampling import Sampler, choose_tokens

LOGITS = torch.tensor([math.log(p) for p in (0.5, 0.3, 0.15, 0.05)])


def draw_many(sampler: Sampler, count: int) -> list[float]:
    """The share of each token in many draws."""
    ids = [choose_tokens(LOGITS[None], [sampler], [0])[0].token_id for _ in range(count)]
    return [ids.count(token) / count for token in range(4)]


def test_greedy_takes_the_likeliest_and_reports_its_logprob() -> None:
    chosen = choose_tokens(torch.stack([LOGITS, LOGITS.flip(0)]), [None, None], [0, 0])
    assert [score.token_id for score in chosen] == [0, 3]
    assert [score.logprob for score in chosen] == pytest.approx([math.log(0.5)] * 2)


def test_each_row_gets_as_many_alternatives_as_it_wants() -> None:
    plain, two, all_of_them = choose_tokens(torch.stack([LOGITS] * 3), [None] * 3, [0, 2, 9])
    assert plain.top == []
    assert [token for token, _ in two.top] == [0, 1]
    assert [math.exp(logprob) for _, logprob in all_of_them.top] == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert two.top[0] == (two.token_id, two.logprob)  # the very same number: harnesses compare them


def test_samples_follow_the_distribution() -> None:
    shares = draw_many(Sampler(temperature=1.0, top_p=1.0, seed=0), 4000)
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_flattens_and_sharpens() -> None:
    wanted = [p**2 for p in (0.5, 0.3, 0.15, 0.05)]
    shares = draw_many(Sampler(temperature=0.5, top_p=1.0, seed=0), 4000)
    assert shares == pytest.approx([w / sum(wanted) for w in wanted], abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    shares = draw_many(Sampler(temperature=1.0, top_p=0.6, seed=0), 4000)
    assert shares == pytest.approx([0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0], abs=0.03)
    assert draw_many(Sampler(temperature=1.0, top_p=0.01, seed=0), 50) == [1.0, 0.0, 0.0, 0.0]


def test_same_seed_draws_the_same_whatever_else_is_in_the_batch() -> None:
    def ids(others: int) -> list[int]:
        sampler = Sampler(temperature=1.0, top_p=0.9, seed=7)
        rest = [Sampler(temperature=2.0, top_p=1.0, seed=s) if s % 2 else None for s in range(others)]
        logits, tops = LOGITS.expand(others + 1, 4), [0] * (others + 1)
        return [choose_tokens(logits, [*rest, sampler], tops)[-1].token_id for _ in range(30)]

    assert ids(0) == ids(5)
    assert len(set(ids(0))) > 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_coldest_temperatures_are_greedy(temperature: float) -> None:
    assert draw_many(Sampler(temperature=temperature, top_p=1e-9, seed=0), 20) == [1.0, 0.0, 0.0, 0.0]
    assert draw_many(Sampler(temperature=temperature, top_p=1.0, seed=0), 20) == [1.0, 0.0, 0.0, 0.0]
