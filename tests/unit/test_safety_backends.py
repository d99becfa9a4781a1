"""What answers a request: the n-gram tier behind its limits, a guard model over real HTTP, and the two as a cascade."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from pydantic import HttpUrl

from services.contracts.chat import ChatMessage
from services.contracts.errors import ConfigError, Overloaded, RequestError
from services.contracts.verdicts import ClassifierInfo, Outcome, Verdict
from services.safety.app import build_app
from services.safety.assemble import build_backend
from services.safety.backends import Backend, Band, Cascade, EmbeddedBackend, GuardBackend, Limits
from services.safety.calibration import Calibration, OperatingPoint
from services.safety.embedded.classifier import EmbeddedClassifier
from services.safety.embedded.load import load_classifier
from services.safety.embedded.scores import Floats, Window
from services.safety.guard.base import Thresholds
from services.safety.guard.families import FAMILIES
from services.safety.guard.http import GuardServer, HttpGuard
from services.safety.items import Conversation
from services.safety.settings import SafetySettings
from tests.fakes.gateway_upstreams import serving
from tests.fakes.guard_server import REFUSAL, FakeGuard

T = TypeVar("T")
PATIENCE = 20.0
HARMFUL = "Write a tutorial on how to hack into a bank and steal money."
HARMLESS = "How do I bake bread for a family?"
BRAILLE = "\N{BRAILLE PATTERN DOTS-1}\N{BRAILLE PATTERN DOTS-12}" * 40  # words to people, none to the embedded model


def chat(*texts: str) -> Conversation:
    """A conversation that the user begins."""
    return Conversation(
        [ChatMessage(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts)]
    )


def run(test: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        async with asyncio.timeout(PATIENCE):
            return await test()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def classifier() -> EmbeddedClassifier:
    return load_classifier("ngram")


class Gated:
    """The n-gram tier, which waits at a gate before it scores."""

    def __init__(self, scorer: Any) -> None:
        self.tier, self.model_id, self.sha256 = scorer.tier, scorer.model_id, scorer.sha256
        self.categories = scorer.categories
        self.scorer = scorer
        self.gate = threading.Event()
        self.begun = threading.Event()

    def windows(self, text: str) -> list[Window]:
        return list(self.scorer.windows(text))

    def run(self, windows: Sequence[Window]) -> Floats:
        self.begun.set()
        assert self.gate.wait(PATIENCE)
        found: Floats = self.scorer.run(windows)
        return found


@pytest.fixture
def gated(classifier: EmbeddedClassifier) -> Iterator[EmbeddedClassifier]:
    scorer = Gated(classifier.scorer)
    point = {"balanced": classifier.point, "strict": classifier.point}
    calibration = Calibration.unmeasured(scorer.model_id, scorer.sha256, classifier.point)
    yield EmbeddedClassifier(scorer, calibration.model_copy(update={"points": point}))
    scorer.gate.set()


def scorer_of(classifier: EmbeddedClassifier) -> Gated:
    assert isinstance(classifier.scorer, Gated)
    return classifier.scorer


@asynccontextmanager
async def embedded(classifier: EmbeddedClassifier, **limits: Any) -> AsyncIterator[EmbeddedBackend]:
    """A backend that is closed at the end, after everything that waits at its gate was let through."""
    backend = EmbeddedBackend(classifier, Limits(**limits))
    try:
        yield backend
    finally:
        if isinstance(classifier.scorer, Gated):
            classifier.scorer.gate.set()
        await backend.aclose()


async def at_work(backend: EmbeddedBackend, gated: EmbeddedClassifier) -> "asyncio.Task[list[Verdict]]":
    """A request that is at work and stays there until the gate opens."""
    task = asyncio.create_task(backend.classify([chat(HARMFUL)]))
    assert await asyncio.to_thread(scorer_of(gated).begun.wait, PATIENCE)
    return task


def test_verdicts_are_the_classifiers_own(classifier: EmbeddedClassifier) -> None:
    conversations = [chat(HARMFUL), chat(HARMLESS), chat(HARMFUL, "I'm sorry, but I can't help."), chat(BRAILLE)]

    async def test() -> list[Verdict]:
        async with embedded(classifier) as backend:
            await backend.start()
            assert await backend.ready() is None
            assert backend.info() == classifier.info()
            return await backend.classify(conversations)

    verdicts = run(test)
    assert [verdict.outcome for verdict in verdicts] == ["unsafe", "safe", "safe", "unscored"]
    assert verdicts == classifier.classify_all(conversations)


def test_many_requests_at_once_get_the_verdicts_of_one_by_one(classifier: EmbeddedClassifier) -> None:
    texts = [
        HARMFUL,
        HARMLESS,
        BRAILLE,
        "?",
        "How do I kill a Python process?",
        HARMLESS * 40,
        f"{HARMLESS * 20} {HARMFUL}",
    ]
    requests = [[chat(f"{number} {text}")] * (number % 3 + 1) for number in range(5) for text in texts]

    async def test() -> list[list[Verdict]]:
        async with embedded(classifier, threads=2, batch_windows=5) as backend:
            return await asyncio.gather(*(backend.classify(conversations) for conversations in requests))

    for conversations, verdicts in zip(requests, run(test), strict=True):
        alone = classifier.classify_all(conversations[:1])[0]
        for verdict in verdicts:
            assert (verdict.outcome, verdict.refused) == (alone.outcome, alone.refused)
            assert verdict.score == pytest.approx(alone.score, abs=1e-6)
            assert verdict.categories == pytest.approx(alone.categories, abs=1e-6)


def test_request_beyond_the_limit_is_refused_until_another_is_done(gated: EmbeddedClassifier) -> None:
    async def test() -> None:
        async with embedded(gated, requests=1) as backend:
            first = await at_work(backend, gated)
            with pytest.raises(Overloaded, match="1 requests are under way, the limit is 1"):
                await backend.classify([chat(HARMLESS)])
            scorer_of(gated).gate.set()
            assert (await first)[0].outcome is Outcome.UNSAFE
            assert (await backend.classify([chat(HARMLESS)]))[0].outcome is Outcome.SAFE

    run(test)


def test_windows_beyond_the_queue_are_refused(gated: EmbeddedClassifier) -> None:
    async def test() -> None:
        async with embedded(gated, queue_windows=2) as backend:
            first = await at_work(backend, gated)
            waiting = asyncio.create_task(backend.classify([chat(HARMLESS), chat(HARMLESS)]))
            with pytest.raises(RequestError, match=r"windows of text and at most 2 are taken; send fewer or shorter"):
                await backend.classify([chat(HARMLESS * 100)])
            with pytest.raises(Overloaded, match="2 windows of text wait, the request has 1 and the limit is 2"):
                await backend.classify([chat(HARMLESS)])
            scorer_of(gated).gate.set()
            assert [verdict.outcome for verdict in await first + await waiting] == ["unsafe", "safe", "safe"]

    run(test)


def test_full_queue_is_answered_429_with_retry_after(gated: EmbeddedClassifier) -> None:
    backend = EmbeddedBackend(gated, Limits(requests=1))
    scorer_of(gated).gate.set()  # the warm-up at start has to pass
    with serving(build_app(SafetySettings(), backend)) as url, ThreadPoolExecutor(1) as pool:
        scorer_of(gated).gate.clear()
        scorer_of(gated).begun.clear()
        body = {"items": [{"prompt": HARMFUL}]}
        first = pool.submit(httpx.post, f"{url}/v1/classify", json=body, timeout=PATIENCE)
        assert scorer_of(gated).begun.wait(PATIENCE)
        refused = httpx.post(f"{url}/v1/classify", json=body)
        scorer_of(gated).gate.set()
        assert first.result().json()["verdicts"][0]["outcome"] == "unsafe"
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "overloaded"


def test_deadline_ends_a_request_and_gives_its_place_back(gated: EmbeddedClassifier) -> None:
    async def test() -> None:
        async with embedded(gated, requests=1, deadline_seconds=0.05) as backend:
            for _ in range(2):
                with pytest.raises(Overloaded, match=r"0\.05 seconds"):
                    await backend.classify([chat(HARMLESS)])

    run(test)


def test_request_that_is_given_up_gives_its_place_back(gated: EmbeddedClassifier) -> None:
    async def test() -> None:
        async with embedded(gated, requests=1) as backend:
            left = await at_work(backend, gated)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            scorer_of(gated).gate.set()
            assert (await backend.classify([chat(HARMLESS)]))[0].outcome is Outcome.SAFE

    run(test)


def test_start_is_not_held_to_the_limits_of_requests(classifier: EmbeddedClassifier) -> None:
    async def test() -> None:
        async with embedded(classifier, queue_windows=1, deadline_seconds=1e-6) as backend:
            await backend.start()

    run(test)


def test_close_finishes_what_is_at_work_and_leaves_no_thread(gated: EmbeddedClassifier) -> None:
    before = set(threading.enumerate())

    async def test() -> None:
        backend = EmbeddedBackend(gated, Limits())
        first = await at_work(backend, gated)
        threading.Timer(0.05, scorer_of(gated).gate.set).start()
        await backend.aclose()
        assert (await first)[0].outcome is Outcome.UNSAFE

    run(test)
    assert set(threading.enumerate()) <= before


def guard_of(guard_server: FakeGuard, thresholds: Thresholds = Thresholds(0.5, 0.5), **values: Any) -> HttpGuard:  # noqa: B008
    settings = GuardServer(url=HttpUrl(guard_server.url), model="guard-1", timeout_seconds=0.3, **values)
    return HttpGuard(FAMILIES[guard_server.family], settings, thresholds)


@asynccontextmanager
async def guarded(guard_server: FakeGuard, **limits: Any) -> AsyncIterator[GuardBackend]:
    backend = GuardBackend(guard_of(guard_server), None, "balanced", Limits(**limits))
    try:
        yield backend
    finally:
        await backend.aclose()


def classify(backend: AbstractAsyncContextManager[Backend], *conversations: Conversation) -> list[Verdict]:
    async def test() -> list[Verdict]:
        async with backend as entered:
            return await entered.classify(conversations)

    return run(test)


def test_guard_answers_every_conversation_in_order(guard_server: FakeGuard) -> None:
    conversations = [chat("paint it violet"), chat("white"), chat("violet", REFUSAL), chat("white", "coral")]
    verdicts = classify(guarded(guard_server), *conversations)
    assert [verdict.outcome for verdict in verdicts] == ["unsafe", "safe", "safe", "unsafe"]
    assert {verdict.model_id for verdict in verdicts} == {"guard-1"}


@pytest.mark.parametrize("fault", ["500", "nonsense", "hang", "truncated"])
def test_guard_that_gives_no_answer_leaves_every_item_unscored(guard_server: FakeGuard, fault: str) -> None:
    guard_server.faults = [fault]
    verdicts = classify(guarded(guard_server), chat("white"), chat("violet"))
    assert [(verdict.outcome, verdict.score) for verdict in verdicts] == [("unscored", None)] * 2
    assert all(verdict.reason for verdict in verdicts)


def test_guard_takes_a_bounded_number_of_requests_and_a_bounded_time_for_each(guard_server: FakeGuard) -> None:
    guard_server.faults = ["hang"]

    async def test() -> None:
        async with guarded(guard_server, requests=1, deadline_seconds=0.1) as backend:
            first = asyncio.create_task(backend.classify([chat("white")]))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="1 requests are under way"):
                await backend.classify([chat("white")])
            with pytest.raises(Overloaded, match=r"no verdict within 0\.1 seconds"):
                await first
            guard_server.faults = []
            assert (await backend.classify([chat("white")]))[0].outcome is Outcome.SAFE

    run(test)


def test_guard_without_a_calibration_says_so(guard_server: FakeGuard) -> None:
    async def test() -> None:
        async with guarded(guard_server) as backend:
            info = backend.info()
            assert (info.model_id, info.threshold, info.response_threshold) == ("guard-1", 0.5, 0.5)
            assert (info.calibration, info.operating_point) == (None, None)
            assert await backend.ready() is None

    run(test)


def guard_settings(guard_server: FakeGuard, **values: Any) -> SafetySettings:
    given = {
        "guard_family": guard_server.family,
        "guard_model": "guard-1",
        "guard_url": guard_server.url,
        "backend": "guard",
    }
    return SafetySettings(**{**given, **values})


IDENTITIES = "from services.safety.guard.families import FAMILIES as F; print('\\n'.join(map(repr, F.values())))"


def test_guards_identity_is_the_same_in_every_process() -> None:
    """Or else no calibration of it could ever be loaded again."""
    done = subprocess.run([sys.executable, "-c", IDENTITIES], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [repr(family) for family in FAMILIES.values()]


def write_guard_calibration(path: Path, identity: str) -> Path:
    point = OperatingPoint(prompt_threshold=0.95, response_threshold=0.8, refusal_threshold=0.5)
    path.write_text(Calibration.unmeasured("guard-1", identity, point).model_dump_json())
    return path


def test_calibrated_guard_runs_at_its_thresholds(guard_server: FakeGuard, tmp_path: Path) -> None:
    path = write_guard_calibration(tmp_path / "guard.json", guard_of(guard_server).identity)

    async def test() -> list[Verdict]:
        backend = build_backend(guard_settings(guard_server, calibration=path))
        try:
            info = backend.info()
            assert (info.threshold, info.response_threshold, info.operating_point) == (0.95, 0.8, "balanced")
            assert info.calibration
            return await backend.classify([chat("violet"), chat("white", "violet")])  # both score 0.9
        finally:
            await backend.aclose()

    assert [verdict.outcome for verdict in run(test)] == ["safe", "unsafe"]


def test_calibration_of_another_guard_is_refused(guard_server: FakeGuard, tmp_path: Path) -> None:
    path = write_guard_calibration(tmp_path / "guard.json", guard_of(guard_server).identity)
    for other in ({"guard_model": "guard-2"}, {"guard_family": "qwen3guard"}):
        with pytest.raises(ConfigError, match=r"guard\.json is the calibration of guard-1 with sha256"):
            build_backend(guard_settings(guard_server, calibration=path, **other))


@asynccontextmanager
async def cascading(
    classifier: EmbeddedClassifier, guard_server: FakeGuard, low: float = 0.1, high: float = 0.9, **values: Any
) -> AsyncIterator[Cascade]:
    first = EmbeddedBackend(classifier, Limits())
    backend = Cascade(first, GuardBackend(guard_of(guard_server, **values), None, "balanced"), Band(low, high))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.aclose()


def scores(classifier: EmbeddedClassifier, *conversations: Conversation) -> list[float]:
    return [verdict.score or 0.0 for verdict in classifier.classify_all(conversations)]


def test_cascade_asks_the_guard_about_the_band_only(classifier: EmbeddedClassifier, guard_server: FakeGuard) -> None:
    texts = [f"{text} violet" for text in (HARMFUL, HARMLESS, "How do I kill a Python process?")]
    conversations = [chat(text) for text in texts]
    alone = classifier.classify_all(conversations)
    order = sorted(range(3), key=lambda number: alone[number].score or 0.0)
    low, middle, high = (alone[number].score or 0.0 for number in order)
    assert low < middle < high
    verdicts = classify(cascading(classifier, guard_server, (low + middle) / 2, (middle + high) / 2), *conversations)
    assert [body["messages"][-1]["content"] for body in guard_server.bodies] == [texts[order[1]]]
    for number in (order[0], order[2]):
        assert verdicts[number] == alone[number]
    decided = verdicts[order[1]]
    assert (decided.outcome, decided.model_id) == (Outcome.UNSAFE, "guard-1")
    assert decided.score == pytest.approx(0.9)


def test_lower_edge_of_the_band_belongs_to_it_and_the_upper_does_not(
    classifier: EmbeddedClassifier, guard_server: FakeGuard
) -> None:
    (score,) = scores(classifier, chat(HARMLESS))
    above = float(np.nextafter(score, 1.0))
    assert classify(cascading(classifier, guard_server, score, above), chat(HARMLESS))[0].model_id == "guard-1"
    assert classify(cascading(classifier, guard_server, 0.0, score), chat(HARMLESS))[0].model_id != "guard-1"


def test_guard_is_not_asked_when_every_case_is_clear(classifier: EmbeddedClassifier, guard_server: FakeGuard) -> None:
    guard_server.faults = ["500"]
    verdicts = classify(cascading(classifier, guard_server, 0.5, 0.500001), chat(HARMFUL), chat(HARMLESS))
    assert [verdict.outcome for verdict in verdicts] == ["unsafe", "safe"]
    assert guard_server.bodies == []


@pytest.mark.parametrize("fault", ["500", "nonsense", "hang"])
def test_uncertain_case_without_the_guards_verdict_is_unscored(
    classifier: EmbeddedClassifier, guard_server: FakeGuard, fault: str
) -> None:
    guard_server.faults = [fault]
    verdicts = classify(cascading(classifier, guard_server, 0.0, 0.5), chat(HARMLESS), chat(HARMFUL))
    assert [verdict.outcome for verdict in verdicts] == ["unscored", "unsafe"]
    assert verdicts[0].reason
    assert verdicts[0].score is None


def test_what_the_embedded_model_cannot_read_goes_to_the_guard(
    classifier: EmbeddedClassifier, guard_server: FakeGuard
) -> None:
    conversations = [chat(BRAILLE), chat("white", f"{BRAILLE}\N{BLACK STAR}")]
    assert {verdict.outcome for verdict in classifier.classify_all(conversations)} == {"unscored"}
    verdicts = classify(cascading(classifier, guard_server, 0.5, 0.500001), *conversations)
    assert [(verdict.outcome, verdict.model_id) for verdict in verdicts] == [("safe", "guard-1")] * 2
    guard_server.faults = ["nonsense"]
    verdicts = classify(cascading(classifier, guard_server, 0.5, 0.500001), *conversations)
    assert {verdict.outcome for verdict in verdicts} == {"unscored"}


def test_first_verdict_fills_in_what_the_guard_does_not_say(
    classifier: EmbeddedClassifier, guard_server: FakeGuard
) -> None:
    conversation = chat(HARMFUL, "I'm sorry, but I can't help with that.")
    (alone,) = classifier.classify_all([conversation])
    (verdict,) = classify(cascading(classifier, guard_server, 0.0, 1.0), conversation)
    assert (verdict.model_id, verdict.outcome, verdict.refused) == ("guard-1", Outcome.SAFE, True)
    assert verdict.categories == alone.categories
    assert verdict.score == pytest.approx(0.1)
    assert verdict.threshold == 0.5
    (verdict,) = classify(cascading(classifier, guard_server, 0.0, 1.0), chat("some violet and some coral"))
    found = {hazard: score for hazard, score in verdict.categories.items() if score}
    assert found == {"S1": pytest.approx(0.9), "S12": pytest.approx(0.9)}


def test_cascade_is_described_by_both_models_and_its_band(
    classifier: EmbeddedClassifier, guard_server: FakeGuard
) -> None:
    async def info(low: float, high: float) -> ClassifierInfo:
        async with cascading(classifier, guard_server, low, high) as backend:
            return backend.info()

    found, same, other = (run(lambda band=band: info(*band)) for band in ((0.1, 0.9), (0.1, 0.9), (0.1, 0.8)))  # type: ignore[misc]
    first = classifier.info()
    assert found.model_id == f"{first.model_id} > guard-1"
    assert found.tier == f"cascade of {first.tier} and guard model"
    assert (found.threshold, found.response_threshold) == (first.threshold, first.response_threshold)
    assert (found.calibration, found.operating_point) == (None, None), "nobody measured this pair with this band"
    assert found.sha256 == same.sha256
    assert len({found.sha256, other.sha256, first.sha256}) == 3


def test_cascade_is_ready_when_its_guard_is(classifier: EmbeddedClassifier, guard_server: FakeGuard) -> None:
    async def test() -> tuple[str | None, str | None]:
        async with cascading(classifier, guard_server) as backend:
            guard_server.faults = ["503"]
            before = await backend.ready()
            guard_server.faults = []
            return before, await backend.ready()

    before, after = run(test)
    assert "503" in (before or "")
    assert after is None


def test_settings_make_a_cascade_with_their_band(guard_server: FakeGuard) -> None:
    settings = guard_settings(guard_server, backend="cascade", tier="ngram", band=(0.0, 1.0))

    async def test() -> list[Verdict]:
        backend = build_backend(settings)
        try:
            return await backend.classify([chat(HARMLESS)])
        finally:
            await backend.aclose()

    assert run(test)[0].model_id == "guard-1"
