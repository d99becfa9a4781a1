"""The engine's promises: a bounded queue, cancellation, and failures that stay where they arise."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from services.contracts.errors import Overloaded
from services.inference.engine import Engine, GenerationFailed
from services.inference.generation import Generation, Piece, Update, Variant
from services.inference.model import BaseModel, load_base
from services.inference.settings import InferenceSettings
from services.inference.text import Detokenizer, StopScanner
from tests.fakes.model_servers import Failing
from tests.fakes.tiny_model import build_tiny_model


class Collected:
    """A generation's updates, and the moment when it is over."""

    def __init__(self, base: BaseModel, variant: Variant, max_tokens: int = 8) -> None:
        self.updates: list[Update] = []
        self.done = threading.Event()
        self.generation = Generation(
            variant=variant,
            prompt_ids=[1, 3, 70, 71, 4],
            max_tokens=max_tokens,
            sampler=None,
            end_ids=frozenset(),
            detokenizer=Detokenizer(base.decode),
            stops=StopScanner([]),
        )
        self.generation.deliver = self._deliver

    def _deliver(self, update: Update) -> None:
        self.updates.append(update)
        if not isinstance(update, Piece) or update.finish:
            self.done.set()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path: Path = build_tiny_model(tmp_path_factory.mktemp("engine") / "tiny")
    return load_base(InferenceSettings(model=str(path)))


@pytest.fixture
def variant(base: BaseModel) -> Variant:
    return Variant("base", base.sha256, base.network)


def test_full_queue_refuses_and_cancelled_requests_do_not_fill_it(base: BaseModel, variant: Variant) -> None:
    engine = Engine(max_batch=2, max_waiting=3)  # not started: everything waits
    waiting = [Collected(base, variant) for _ in range(4)]
    for collected in waiting[:3]:
        engine.submit(collected.generation)
    with pytest.raises(Overloaded, match="3 requests are waiting, which is the limit"):
        engine.submit(waiting[3].generation)
    waiting[0].generation.cancel()
    engine.submit(waiting[3].generation)
    engine.start()
    assert all(collected.done.wait(10) for collected in waiting[1:])
    assert waiting[0].updates == []
    engine.stop()


def test_more_requests_than_places_are_all_answered_alike(base: BaseModel, variant: Variant) -> None:
    engine = Engine(max_batch=3, max_waiting=100)
    engine.start()
    many = [Collected(base, variant, max_tokens=3 + n % 5) for n in range(20)]
    for collected in many:
        engine.submit(collected.generation)
    assert all(collected.done.wait(10) for collected in many)
    longest = [piece.score.token_id for piece in many[4].updates if isinstance(piece, Piece)]
    for n, collected in enumerate(many):
        assert [p.score.token_id for p in collected.updates if isinstance(p, Piece)] == longest[: 3 + n % 5]
    engine.stop()


def test_cancellation_frees_the_place_for_the_next(base: BaseModel, variant: Variant) -> None:
    engine = Engine(max_batch=1, max_waiting=10)
    engine.start()
    endless, next_one = Collected(base, variant, max_tokens=100_000), Collected(base, variant)
    engine.submit(endless.generation)
    engine.submit(next_one.generation)
    assert not next_one.done.wait(0.1)
    endless.generation.cancel()
    assert next_one.done.wait(10)
    engine.stop()


def test_failure_ends_its_own_batch_only(base: BaseModel, variant: Variant) -> None:
    engine = Engine(max_batch=8, max_waiting=10)
    failing: Any = Failing(base.network)
    broken = Variant("broken", "0" * 64, failing)
    hurt, well = Collected(base, broken, max_tokens=50), Collected(base, variant, max_tokens=50)
    engine.submit(hurt.generation)
    engine.submit(well.generation)
    engine.start()
    assert hurt.done.wait(10)
    assert well.done.wait(10)
    assert isinstance(hurt.updates[-1], GenerationFailed)
    assert len(well.updates) == 50
    later = Collected(base, broken)
    engine.submit(later.generation)
    assert later.done.wait(10)
    assert isinstance(later.updates[-1], Piece)
    engine.stop()


def test_stopping_ends_what_is_not_finished_with_an_error(base: BaseModel, variant: Variant) -> None:
    engine = Engine(max_batch=1, max_waiting=10)
    engine.start()
    unfinished = [Collected(base, variant, max_tokens=100_000) for _ in range(2)]
    for collected in unfinished:
        engine.submit(collected.generation)
    time.sleep(0.05)
    engine.stop()
    assert not engine.alive
    assert all(isinstance(collected.updates[-1], GenerationFailed) for collected in unfinished)
