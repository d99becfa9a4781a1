"""Checks of one request: decided as the policy says, noted, and failing closed."""

import asyncio
from collections.abc import Sequence

import pytest

from gateway.checks import Checker
from gateway.policy import Action, Decision, Direction, DirectionPolicy, Policy
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, Outcome, Verdict


def verdict(item: ClassifyItem) -> Verdict:
    text = item.response or item.prompt or ""
    outcome = Outcome.UNSCORED if "unclear" in text else Outcome.UNSAFE if "bad" in text else Outcome.SAFE
    return Verdict(outcome=outcome, model_id="test")


class Classifier:
    """Notes its calls; fails on a text that says so."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    async def __call__(self, items: Sequence[ClassifyItem], direction: Direction, seconds: float) -> list[Verdict]:
        self.calls.append([item.response or item.prompt or "" for item in items])
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


def decide(classifier: Classifier, items: list[ClassifyItem], policy: Policy | None = None) -> Decision:
    checker = Checker(classifier, policy or Policy(), Notes())
    return asyncio.run(checker.decide(items, Direction.RESPONSE))


@pytest.mark.parametrize(("texts", "allowed"), [(("fine", "good"), True), (("fine", "bad"), False)])
def test_one_unsafe_text_decides(texts: tuple[str, ...], allowed: bool) -> None:
    classifier = Classifier()
    assert decide(classifier, answers(*texts)).allowed is allowed
    assert classifier.calls == [list(texts)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("unclear", "safety: gave no verdict on the response, so it cannot be let through"),
        ("fails", "safety: gone"),
    ],
)
def test_no_verdict_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(UpstreamUnavailable) as caught:
        decide(Classifier(), answers("fine", text))
    assert str(caught.value) == problem


def test_decisions_are_noted_with_their_verdicts_and_with_what_shadow_would_have_done() -> None:
    notes = Notes()

    async def run() -> list[Decision]:
        policy = Policy(shadow=True, response=DirectionPolicy(action=Action.REDACT))
        checker = Checker(Classifier(), policy, notes)
        return [await checker.decide(answers(*texts), Direction.RESPONSE) for texts in (("fine",), ("bad", "good"))]

    fine, bad = asyncio.run(run())
    assert (fine.allowed, fine.shadowed) == (True, None)
    assert (bad.allowed, bad.shadowed) == (True, Action.REDACT)
    assert [(decision, characters) for decision, _, characters in notes.all] == [(fine, 4), (bad, 7)]
    assert [verdict.outcome for verdict in notes.all[1][1]] == [Outcome.UNSAFE, Outcome.SAFE]


@pytest.mark.parametrize("action", [Action.REDACT, Action.REVISE, Action.REFUSE])
def test_decision_is_the_policys(action: Action) -> None:
    policy = Policy(response=DirectionPolicy(action=action))
    assert decide(Classifier(), answers("bad"), policy).action is action


def test_nothing_to_judge_is_allowed_without_a_call() -> None:
    classifier = Classifier()
    assert decide(classifier, []).allowed
    assert classifier.calls == []
