"""The decode loop: a batch writes what each prompt would get alone, and what transformers' own generate writes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.batch import Batch
from services.inference.generation import Finish, Generation, Piece, Update, Variant
from services.inference.model import BaseModel, load_base
from services.inference.sampling import Sampler
from services.inference.settings import InferenceSettings
from services.inference.text import Detokenizer, StopScanner
from tests.fakes.tiny_model import build_tiny_model

Make = Callable[..., "Recorded"]


class Recorded:
    """A generation that keeps what it delivers."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pieces: list[Piece] = []
        generation.deliver = self._keep

    def _keep(self, update: Update) -> None:
        assert isinstance(update, Piece)
        self.pieces.append(update)

    @property
    def ids(self) -> list[int]:
        return [piece.score.token_id for piece in self.pieces]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path: Path = build_tiny_model(tmp_path_factory.mktemp("batch") / "tiny")
    return load_base(InferenceSettings(model=str(path)))


@pytest.fixture
def make(base: BaseModel) -> Make:
    variant = Variant(base.model_id, base.sha256, base.network)

    def generation(prompt_ids: list[int], max_tokens: int = 24, **options: Any) -> Recorded:
        return Recorded(
            Generation(
                variant=variant,
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                sampler=options.get("sampler"),
                end_ids=options.get("end_ids", base.end_ids),
                detokenizer=Detokenizer(base.decode),
                stops=StopScanner(options.get("stops", [])),
            )
        )

    return generation


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, 3, *(rng.randrange(5, 300) for _ in range(rng.randrange(1, 60))), 4] for _ in range(count)]


def finish(base: BaseModel, generations: list[Recorded]) -> None:
    batch = Batch(base.network)
    batch.admit([g.generation for g in generations])
    run(batch)


def run(batch: Batch) -> None:
    while True:
        batch.leave()
        if not len(batch):
            return
        batch.step()


def by_transformers(base: BaseModel, prompt_ids: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    network: Any = base.network
    output = network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return [int(i) for i in output[0, len(prompt_ids) :]]


def test_mixed_batch_equals_each_prompt_alone_and_transformers(base: BaseModel, make: Make) -> None:
    asked = prompts(20)
    together = [make(ids, max_tokens=5 + 2 * (n % 10)) for n, ids in enumerate(asked)]
    finish(base, together)
    for n, ids in enumerate(asked):
        alone = make(ids, max_tokens=5 + 2 * (n % 10))
        finish(base, [alone])
        assert together[n].ids == alone.ids == by_transformers(base, ids, 5 + 2 * (n % 10))
        assert together[n].text == base.decode(alone.ids)


def test_logprobs_do_not_depend_on_the_batch(base: BaseModel, make: Make) -> None:
    together = [make(ids) for ids in prompts(8)]
    alone = make(prompts(8)[0])
    finish(base, together)
    finish(base, [alone])
    assert [p.score.logprob for p in together[0].pieces] == pytest.approx(
        [p.score.logprob for p in alone.pieces], abs=1e-4
    )


def test_answers_join_and_leave_in_the_middle(base: BaseModel, make: Make) -> None:
    asked = prompts(9, seed=1)
    generations = [make(ids, max_tokens=20) for ids in asked]
    batch = Batch(base.network)
    for start in range(0, 9, 3):
        batch.leave()
        batch.admit([g.generation for g in generations[start : start + 3]])
        for _ in range(4):
            batch.leave()
            batch.step()
    run(batch)
    assert [g.ids for g in generations] == [by_transformers(base, ids, 20) for ids in asked]


def test_cancelled_answer_frees_its_place(base: BaseModel, make: Make) -> None:
    stays, goes = make(prompts(2)[0], max_tokens=30), make(prompts(2)[1], max_tokens=30)
    batch = Batch(base.network)
    batch.admit([stays.generation, goes.generation])
    goes.generation.cancel()
    batch.leave()
    assert len(batch) == 1
    run(batch)
    assert len(goes.ids) == 1
    assert stays.ids == by_transformers(base, prompts(2)[0], 30)


def test_seeded_sample_is_the_same_alone_and_in_a_batch(base: BaseModel, make: Make) -> None:
    def sampled() -> Recorded:
        return make(prompts(1)[0], sampler=Sampler(temperature=0.8, top_p=0.95, seed=5))

    alone, again, other = (
        sampled(),
        sampled(),
        make(prompts(1)[0], sampler=Sampler(temperature=0.8, top_p=0.95, seed=6)),
    )
    finish(base, [alone])
    finish(base, [*(make(ids) for ids in prompts(5, seed=2)), again, other])
    assert alone.ids == again.ids
    assert alone.ids != other.ids


def test_end_token_ends_the_answer_and_is_no_text(base: BaseModel, make: Make) -> None:
    free = make(prompts(1)[0])
    finish(base, [free])
    end = free.ids[3]
    place = free.ids.index(end)
    ended = make(prompts(1)[0], end_ids=frozenset({end}))
    finish(base, [ended])
    assert ended.ids == free.ids[: place + 1]
    assert ended.text == base.decode(free.ids[:place])
    assert (ended.pieces[-1].finish, ended.pieces[-1].special) == (Finish.END, True)


def test_stop_string_ends_the_answer(base: BaseModel, make: Make) -> None:
    free = make(prompts(1)[0])
    finish(base, [free])
    stop = free.text[4:6]
    stopped = make(prompts(1)[0], stops=[stop])
    finish(base, [stopped])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.pieces[-1].finish is Finish.STOP
    assert len(stopped.ids) < len(free.ids)


def test_limit_ends_the_answer(base: BaseModel, make: Make) -> None:
    one = make(prompts(1)[0], max_tokens=1)
    finish(base, [one])
    assert (len(one.ids), one.pieces[-1].finish) == (1, Finish.LENGTH)
