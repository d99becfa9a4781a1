"""Checks of one request: merged into few calls, each decided by itself, and failing closed."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.checks import Checker
from gateway.policy import Action, Decision, Direction, DirectionPolicy, Policy
from gateway.shared_calls import MAX_ITEMS
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, Outcome, Verdict


def verdict(item: ClassifyItem) -> Verdict:
    text = item.response or item.prompt or ""
    outcome = Outcome.UNSCORED if "unclear" in text else Outcome.UNSAFE if "bad" in text else Outcome.SAFE
    return Verdict(outcome=outcome, model_id="test")


class Classifier:
    """Notes its calls; fails on a text that says so."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[list[str]] = []
        self.running = self.most = 0
        self._seconds = seconds

    async def __call__(self, items: Sequence[ClassifyItem], direction: Direction, seconds: float) -> list[Verdict]:
        self.calls.append([item.response or item.prompt or "" for item in items])
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self._seconds)
        self.running -= 1
        if any("fails" in text for text in self.calls[-1]):
            raise UpstreamUnavailable("safety", "gone")
        return [verdict(item) for item in items]


class Notes:
    """Takes what a checker notes: decisions, verdicts, characters, seconds."""

    def __init__(self) -> None:
        self.all: list[tuple[Decision, Sequence[Verdict], int]] = []

    def __call__(self, decision: Decision, verdicts: Sequence[Verdict], characters: int, seconds: float) -> None:
        assert seconds >= 0
        self.all.append((decision, verdicts, characters))


def answers(*texts: str) -> list[ClassifyItem]:
    return [ClassifyItem(prompt="hi", response=text) for text in texts]


def decisions(classifier: Classifier, batches: list[list[ClassifyItem]], in_flight: int = 1) -> list[Any]:
    async def run() -> list[Any]:
        checker = Checker(classifier, Policy(), Notes(), in_flight)
        checks = (checker.decide(items, Direction.RESPONSE) for items in batches)
        return await asyncio.gather(*checks, return_exceptions=True)

    return asyncio.run(run())


def allowed(found: list[Any]) -> list[bool | str]:
    return [one.allowed if isinstance(one, Decision) else str(one) for one in found]


def test_checks_of_the_same_moment_go_in_one_call_and_are_decided_one_by_one() -> None:
    classifier = Classifier()
    found = decisions(classifier, [answers("fine"), answers("bad", "fine"), answers("good"), answers("unclear")])
    no_verdict = "safety: gave no verdict on the response, so it cannot be let through"
    assert allowed(found) == [True, False, True, no_verdict]
    assert classifier.calls == [["fine", "bad", "fine", "good", "unclear"]]


def test_what_comes_while_all_slots_are_taken_goes_together_afterwards() -> None:
    classifier = Classifier(0.01)

    async def run() -> None:
        checker = Checker(classifier, Policy(), Notes(), 2)

        async def after(ticks: int) -> Decision:
            for _ in range(3 * ticks):
                await asyncio.sleep(0)
            return await checker.decide(answers(f"text {ticks}"), Direction.RESPONSE)

        assert all(decision.allowed for decision in await asyncio.gather(*map(after, range(6))))

    asyncio.run(run())
    assert classifier.calls == [["text 0"], ["text 1"], ["text 2", "text 3", "text 4", "text 5"]]
    assert classifier.most == 2


def test_decisions_are_noted_with_their_verdicts_and_with_what_shadow_would_have_done() -> None:
    notes = Notes()

    async def run() -> list[Decision]:
        policy = Policy(shadow=True, response=DirectionPolicy(action=Action.REDACT))
        checker = Checker(Classifier(), policy, notes, 1)
        return [await checker.decide(answers(*texts), Direction.RESPONSE) for texts in (("fine",), ("bad", "good"))]

    fine, bad = asyncio.run(run())
    assert (fine.allowed, fine.shadowed) == (True, None)
    assert (bad.allowed, bad.shadowed) == (True, Action.REDACT)
    assert [(decision, characters) for decision, _, characters in notes.all] == [(fine, 4), (bad, 7)]
    assert [verdict.outcome for verdict in notes.all[1][1]] == [Outcome.UNSAFE, Outcome.SAFE]


@pytest.mark.parametrize("action", [Action.REDACT, Action.REVISE, Action.REFUSE])
def test_decision_is_the_policys(action: Action) -> None:
    async def run() -> Decision:
        checker = Checker(Classifier(), Policy(response=DirectionPolicy(action=action)), Notes(), 1)
        return await checker.decide(answers("bad"), Direction.RESPONSE)

    assert asyncio.run(run()).action is action


def test_call_is_bounded() -> None:
    classifier = Classifier()
    assert all(allowed(decisions(classifier, [answers("a", "b", "c")] * 50, in_flight=9)))
    assert max(map(len, classifier.calls)) <= MAX_ITEMS
    assert sum(map(len, classifier.calls)) == 150
    assert allowed(decisions(classifier, [answers(*["x"] * (MAX_ITEMS + 1))])) == [True]


def test_failure_is_no_allowance_for_any_that_went_along() -> None:
    found = decisions(Classifier(), [answers("fine"), answers("fails"), answers("good")])
    assert allowed(found) == ["safety: gone"] * 3


def test_nothing_to_judge_is_allowed_without_a_call() -> None:
    classifier = Classifier()
    assert allowed(decisions(classifier, [[]])) == [True]
    assert classifier.calls == []


@pytest.mark.parametrize("cancelled", [0, 1])
def test_cancelled_check_leaves_nobody_waiting(cancelled: int) -> None:
    classifier = Classifier(60)

    async def run() -> None:
        checker = Checker(classifier, Policy(), Notes(), 1)
        tasks = [asyncio.create_task(checker.decide(answers("fine"), Direction.RESPONSE)) for _ in range(2)]
        await asyncio.sleep(0.01)
        tasks[cancelled].cancel()
        await asyncio.sleep(0.01)
        tasks[1 - cancelled].cancel()
        await asyncio.wait(tasks, timeout=5)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(run())
