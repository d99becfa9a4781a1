"""What a verdict leads to, as a table; and the ledger that stands behind every release."""

import pytest
from prometheus_client import REGISTRY

from gateway.metrics import Ledger, UncheckedRelease
from gateway.policy import Action, Decision, Direction, Policy, decide
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import Outcome, Verdict

DEFAULT = Policy()


def verdict(outcome: str, score: float | None = None, **categories: float) -> Verdict:
    return Verdict(outcome=Outcome(outcome), score=score, threshold=0.5, categories=categories, model_id="test")


SAFE, UNSAFE, UNSCORED = verdict("safe", 0.1), verdict("unsafe", 0.9, S1=0.9), verdict("unscored")


@pytest.mark.parametrize(
    ("verdicts", "policy", "action"),
    [
        ([SAFE], DEFAULT, Action.ALLOW),
        ([SAFE, SAFE], DEFAULT, Action.ALLOW),
        ([UNSAFE], DEFAULT, Action.REFUSE),
        ([SAFE, UNSAFE, SAFE], DEFAULT, Action.REFUSE),
        ([UNSAFE, UNSCORED], DEFAULT, Action.REFUSE),
        ([verdict("unsafe")], DEFAULT, Action.REFUSE),
        ([verdict("safe", 0.4)], Policy(prompt_threshold=0.3), Action.REFUSE),
        ([verdict("safe", 0.3)], Policy(prompt_threshold=0.3), Action.REFUSE),
        ([verdict("safe", 0.4)], Policy(response_threshold=0.3), Action.ALLOW),
        ([verdict("unsafe", 0.6)], Policy(prompt_threshold=0.7), Action.ALLOW),
        ([verdict("unsafe")], Policy(prompt_threshold=0.7), Action.REFUSE),
    ],
)
def test_prompt_decisions(verdicts: list[Verdict], policy: Policy, action: Action) -> None:
    assert decide(verdicts, Direction.PROMPT, policy).action is action


@pytest.mark.parametrize(
    ("verdicts", "policy"),
    [
        ([UNSCORED], DEFAULT),
        ([SAFE, UNSCORED], DEFAULT),
        ([], DEFAULT),
        ([verdict("unscored", 0.1)], Policy(response_threshold=0.5)),
        ([verdict("unscored", 0.9)], Policy(response_threshold=0.5)),
    ],
)
def test_no_verdict_is_no_decision(verdicts: list[Verdict], policy: Policy) -> None:
    with pytest.raises(UpstreamUnavailable, match="safety: gave no verdict on the response"):
        decide(verdicts, Direction.RESPONSE, policy)


def test_categories_over_the_threshold_come_worst_first() -> None:
    decision = decide(
        [verdict("unsafe", 0.9, S10=0.6, S2=0.1), verdict("unsafe", 0.8, S1=0.8)], Direction.RESPONSE, DEFAULT
    )
    assert decision.categories == ("S1", "S10")
    assert decision.reason == "The answer was classified as unsafe: Violent crimes (S1), Hate (S10)."


def test_category_below_every_threshold_is_named_when_it_is_all_there_is() -> None:
    assert decide([verdict("unsafe", 0.9, S2=0.1, X=0.2)], Direction.PROMPT, DEFAULT).categories == ("X",)
    bare = decide([verdict("unsafe", 0.9)], Direction.PROMPT, DEFAULT)
    assert bare.reason == "The prompt was classified as unsafe."


def test_reason_never_quotes_the_classifier() -> None:
    quoting = UNSAFE.model_copy(update={"reason": "because it says: secret"})
    assert "secret" not in decide([quoting], Direction.RESPONSE, DEFAULT).reason


def decision(action: Action, direction: Direction) -> Decision:
    return Decision(action, direction)


def test_ledger_lets_out_what_was_allowed() -> None:
    ledger = Ledger()
    ledger.record(decision(Action.ALLOW, Direction.PROMPT))
    ledger.record(decision(Action.ALLOW, Direction.RESPONSE), 5)
    assert ledger.release("hello") == "hello"


@pytest.mark.parametrize(
    ("decisions", "unchecked"),
    [
        ([], 5),
        ([(Action.ALLOW, Direction.PROMPT)], 5),
        ([(Action.REFUSE, Direction.PROMPT), (Action.ALLOW, Direction.RESPONSE)], 5),
        ([(Action.ALLOW, Direction.PROMPT), (Action.REFUSE, Direction.RESPONSE)], 5),
        ([(Action.ALLOW, Direction.PROMPT), (Action.ALLOW, Direction.RESPONSE)], 2),
    ],
)
def test_ledger_withholds_what_no_decision_covers(decisions: list[tuple[Action, Direction]], unchecked: int) -> None:
    name = "fedward_gateway_characters_released_before_verdict_total"
    before = REGISTRY.get_sample_value(name) or 0
    ledger = Ledger()
    for action, direction in decisions:
        ledger.record(decision(action, direction), 3)
    with pytest.raises(UncheckedRelease):
        ledger.release("hello")
    assert REGISTRY.get_sample_value(name) == before + unchecked
