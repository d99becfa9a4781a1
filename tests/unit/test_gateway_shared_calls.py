"""Checks of many requests in few calls: everybody gets the verdicts on their own texts, in time, or an error."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.shared_calls import MAX_ITEMS, SharedCalls
from services.common.middleware import REQUEST_ID
from services.contracts.errors import FedwardError, UpstreamRejected, UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, Outcome, Verdict


class Classifier:
    """Gives each text's verdict its text as model id; notes its calls, and fails on texts that say so."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[list[str]] = []
        self.running = self.most = self.cancelled = 0
        self.seconds = seconds

    async def __call__(self, items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        texts = [item.prompt or "" for item in items]
        self.calls.append(texts)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if "too long" in texts:
            raise UpstreamRejected("safety", "answered HTTP 422")
        if "broken" in texts:
            raise UpstreamUnavailable("safety", "gone")
        if "bug" in texts:
            raise KeyError("bug")
        return [Verdict(outcome=Outcome.SAFE, model_id=text) for text in texts]


def ask(
    classifier: Classifier, batches: Sequence[Sequence[str]], *, at_once: int = 2, seconds: float = 5.0
) -> list[object]:
    """What each asker gets: the texts that the verdicts are on, or the error."""

    async def run() -> list[object]:
        calls = SharedCalls(classifier, at_once)

        async def one(texts: Sequence[str]) -> list[str] | Exception:
            try:
                verdicts = await calls.classify([ClassifyItem(prompt=text) for text in texts], seconds)
            except (FedwardError, KeyError) as error:
                return error
            return [verdict.model_id for verdict in verdicts]

        return list(await asyncio.gather(*map(one, batches)))

    return asyncio.run(run())


@given(
    batches=st.lists(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=MAX_ITEMS + 1), max_size=30),
    at_once=st.integers(1, 4),
)
def test_everybody_gets_the_verdicts_on_their_own_texts(batches: list[list[str]], at_once: int) -> None:
    classifier = Classifier()
    assert ask(classifier, batches, at_once=at_once) == batches
    assert classifier.most <= at_once
    assert sum(map(len, classifier.calls)) == sum(map(len, batches))
    assert all(len(call) <= MAX_ITEMS for call in classifier.calls if call not in batches)


def test_a_burst_is_few_calls() -> None:
    classifier = Classifier(0.01)
    assert ask(classifier, [["text"]] * 1000) == [["text"]] * 1000
    assert len(classifier.calls) <= 2 + 1000 // MAX_ITEMS + 1


def test_text_that_is_refused_fails_its_own_request_only() -> None:
    found = ask(Classifier(), [["first"], ["fine"], ["too long", "fine"], ["good"]], at_once=1)
    assert isinstance(found.pop(2), UpstreamRejected)
    assert found == [["first"], ["fine"], ["good"]]


def test_checks_of_the_same_moment_go_in_one_call() -> None:
    classifier = Classifier()
    assert ask(classifier, [["one"], ["two", "three"], ["four"]]) == [["one"], ["two", "three"], ["four"]]
    assert classifier.calls == [["one", "two", "three", "four"]]


def test_what_comes_while_all_places_are_taken_goes_together_afterwards() -> None:
    classifier = Classifier(0.01)

    async def run() -> None:
        calls = SharedCalls(classifier, 2)

        async def after(ticks: int) -> list[Verdict]:
            for _ in range(5 * ticks):
                await asyncio.sleep(0)
            return await calls.classify([ClassifyItem(prompt=f"text {ticks}")], 5.0)

        await asyncio.gather(*map(after, range(6)))

    asyncio.run(run())
    assert classifier.calls == [["text 0"], ["text 1"], ["text 2", "text 3", "text 4", "text 5"]]
    assert classifier.most == 2


@pytest.mark.parametrize(("trouble", "error"), [("broken", UpstreamUnavailable), ("bug", KeyError)])
def test_failure_is_everybodys_who_went_along_and_nobodys_after(trouble: str, error: type[Exception]) -> None:
    found = ask(Classifier(), [["fine"], [trouble], ["x"] * MAX_ITEMS], at_once=1)
    assert [type(error) for error in found[:2]] == [error, error]
    assert found[2] == ["x"] * MAX_ITEMS


def test_waiting_is_a_part_of_the_deadline() -> None:
    classifier = Classifier(0.3)
    first, second = ask(classifier, [["x"] * MAX_ITEMS, ["second"]], at_once=1, seconds=0.05)
    assert str(first) == str(second) == "safety: no answer within the deadline"
    assert classifier.calls == [["x"] * MAX_ITEMS]


@pytest.mark.parametrize("cancelled", [0, 1])
def test_who_leaves_keeps_no_place(cancelled: int) -> None:
    classifier = Classifier(0.05)

    async def run() -> list[Verdict]:
        calls = SharedCalls(classifier, 1)
        tasks = [asyncio.create_task(calls.classify([ClassifyItem(prompt=str(n))], 5.0)) for n in range(2)]
        await asyncio.sleep(0.01)
        tasks[cancelled].cancel()
        await asyncio.wait(tasks)
        return await calls.classify([ClassifyItem(prompt="after")], 5.0) + await tasks[1 - cancelled]

    assert [verdict.model_id for verdict in asyncio.run(run())] == ["after", str(1 - cancelled)]


def test_call_ends_when_all_its_requests_have_left() -> None:
    classifier = Classifier(60)

    async def run() -> list[Verdict]:
        calls = SharedCalls(classifier, 1)
        tasks = [asyncio.create_task(calls.classify([ClassifyItem(prompt=str(n))], 5.0)) for n in range(2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert classifier.cancelled == 0
        tasks[1].cancel()
        await asyncio.wait(tasks)
        classifier.seconds = 0.0
        return await calls.classify([ClassifyItem(prompt="after")], 5.0)

    assert [verdict.model_id for verdict in asyncio.run(run())] == ["after"]
    assert classifier.cancelled == 1


def test_late_call_is_left_to_fail_by_itself() -> None:
    ended = []

    async def late(items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        try:
            await asyncio.sleep(seconds + 0.01)
            ended.append("late")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        raise UpstreamUnavailable("safety", "too late")

    async def run() -> None:
        calls = SharedCalls(late, 1)
        with pytest.raises(UpstreamUnavailable, match="no answer within the deadline"):
            await calls.classify([ClassifyItem(prompt="hi")], 0.02)
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert ended == ["late"]


def test_call_bears_the_id_of_its_first_request() -> None:
    ids = []

    async def classify(items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        ids.append(REQUEST_ID.get())
        return [Verdict(outcome=Outcome.SAFE, model_id="test")] * len(items)

    async def run() -> None:
        calls = SharedCalls(classify, 2)

        async def one(request_id: str) -> None:
            REQUEST_ID.set(request_id)
            await calls.classify([ClassifyItem(prompt="hi")], 5.0)

        await asyncio.gather(one("a"), one("b"))
        await one("c")

    asyncio.run(run())
    assert ids == ["a", "c"]
