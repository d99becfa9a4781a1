"""What a verdict leads to, as a table; and the ledger that stands behind every release."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from pydantic import ValidationError

from gateway.metrics import Ledger, UncheckedRelease
from gateway.policy import Action, Decision, Direction, Policy, decide
from services.contracts.errors import UpstreamUnavailable
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Outcome, Verdict

DEFAULT = Policy()
UNAVAILABLE = "unavailable"
SEVERITY = [Action.ALLOW, UNAVAILABLE, Action.REDACT, Action.REVISE, Action.REFUSE]


def verdict(outcome: str, score: float | None = None, **categories: float) -> Verdict:
    return Verdict(outcome=Outcome(outcome), score=score, threshold=0.9, categories=categories, model_id="test")


def answers(**response: Any) -> Policy:
    return Policy.model_validate({"response": response})


SAFE, UNSAFE, UNSCORED = verdict("safe", 0.1), verdict("unsafe", 0.95, S1=0.95), verdict("unscored")
SCORELESS = verdict("unsafe", None, S2=0.9)

GRAVE = answers(action="redact", categories={"S1": {"action": "refuse"}, "S6": {"action": "revise"}})
LOW = answers(threshold=0.2, action="redact", categories={"S1": {"action": "refuse"}})
TIERS = answers(threshold=0.8, categories={"S6": {"threshold": 0.5, "action": "redact"}})
OWN = answers(categories={"S4": {"threshold": 0.3}, "S7": {"threshold": 0.7, "action": "redact"}})
MIXED = answers(action="redact", categories={"S4": {"threshold": 0.5, "action": "refuse"}})

# verdicts, policy for answers, action, categories
DECISIONS = [
    # without thresholds the classifier's finding counts
    ([SAFE], DEFAULT, "allow", ""),
    ([SAFE, SAFE], DEFAULT, "allow", ""),
    ([UNSAFE], DEFAULT, "refuse", "S1"),
    ([verdict("unsafe")], DEFAULT, "refuse", ""),
    ([SAFE, UNSAFE, SAFE], DEFAULT, "refuse", "S1"),
    # an overall threshold stands in place of the finding, where there is a score
    ([verdict("safe", 0.4)], answers(threshold=0.3), "refuse", ""),
    ([verdict("safe", 0.3)], answers(threshold=0.3), "refuse", ""),
    ([verdict("safe", 0.0)], answers(threshold=0), "refuse", ""),
    ([verdict("unsafe", 0.6)], answers(threshold=0.7), "allow", ""),
    ([verdict("unsafe")], answers(threshold=0.7), "refuse", ""),
    ([verdict("safe", 0.4)], Policy.model_validate({"prompt": {"threshold": 0.3}}), "allow", ""),
    # a category over its own threshold is enough
    ([verdict("safe", 0.2, S4=0.3)], OWN, "refuse", "S4"),
    ([verdict("safe", 0.2, S4=0.29)], OWN, "allow", ""),
    ([verdict("safe", 0.2, S7=0.7)], OWN, "redact", "S7"),
    ([verdict("safe", 0.2, S7=0.9, S4=0.4)], OWN, "refuse", "S7 S4"),
    ([verdict("unsafe", 0.95, S7=0.9)], OWN, "refuse", "S7"),
    ([verdict("safe", 0.6, S6=0.5)], TIERS, "redact", "S6"),
    ([verdict("unsafe", 0.8, S6=0.5)], TIERS, "refuse", "S6"),
    # a category without one counts in what is found, from 0.5 on or from a lower overall threshold
    ([verdict("unsafe", 0.95, S2=0.9)], GRAVE, "redact", "S2"),
    ([verdict("unsafe", 0.95, S6=0.5)], GRAVE, "revise", "S6"),
    ([verdict("unsafe", 0.95, S6=0.9, S1=0.5)], GRAVE, "refuse", "S6 S1"),
    ([verdict("unsafe", 0.95, S1=0.49)], GRAVE, "redact", "S1"),
    ([verdict("safe", 0.2, S1=0.99)], GRAVE, "allow", ""),
    ([verdict("safe", 0.2, S1=0.2)], LOW, "refuse", "S1"),
    ([verdict("safe", 0.2, S1=0.19)], LOW, "redact", "S1"),
    ([verdict("unsafe", 0.95, X=0.9)], GRAVE, "redact", "X"),
    # a category that the classifier did not judge is no likelier than harm of any kind
    ([verdict("safe", 0.3)], OWN, "refuse", ""),
    ([verdict("safe", 0.29)], OWN, "allow", ""),
    ([verdict("safe", 0.3, S4=0.0)], OWN, "allow", ""),
    ([verdict("safe", 0.6, S1=0.0)], TIERS, "redact", ""),
    ([verdict("unsafe", 0.95, S2=0.9)], MIXED, "refuse", "S2"),
    ([verdict("unsafe", 0.95, S2=0.9, S4=0.0)], MIXED, "redact", "S2"),
    # over several parts the worst action wins
    ([verdict("unsafe", 0.95, S2=0.9), verdict("unsafe", 0.95, S6=0.8)], GRAVE, "revise", "S2 S6"),
    ([verdict("unsafe", 0.95, S6=0.8), UNSAFE, SAFE], GRAVE, "refuse", "S1 S6"),
    # beside a part without a verdict nothing milder than refusing is sure
    ([UNSAFE, UNSCORED], DEFAULT, "refuse", "S1"),
    ([UNSCORED, verdict("unsafe", 0.95, S2=0.9)], GRAVE, "refuse", "S2"),
    ([SCORELESS], MIXED, "refuse", "S2"),
]


@pytest.mark.parametrize(("verdicts", "policy", "action", "categories"), DECISIONS)
def test_decisions(verdicts: list[Verdict], policy: Policy, action: str, categories: str) -> None:
    expected = Decision(Action(action), Direction.RESPONSE, tuple(categories.split()))
    assert decide(verdicts, Direction.RESPONSE, policy) == expected


@pytest.mark.parametrize(("verdicts", "policy", "action", "categories"), DECISIONS)
def test_shadow_lets_everything_through_and_says_what_it_would_have_done(
    verdicts: list[Verdict], policy: Policy, action: str, categories: str
) -> None:
    shadow = policy.model_copy(update={"shadow": True})
    if UNSCORED in verdicts or SCORELESS in verdicts:
        with pytest.raises(UpstreamUnavailable):
            decide(verdicts, Direction.RESPONSE, shadow)
        return
    decision = decide(verdicts, Direction.RESPONSE, shadow)
    assert decision.allowed
    assert decision.shadowed == (None if action == "allow" else action)
    assert decision.categories == tuple(categories.split())
    assert ("as safe" in decision.reason) is (action == "allow")


@pytest.mark.parametrize(
    ("verdicts", "policy"),
    [
        ([UNSCORED], DEFAULT),
        ([SAFE, UNSCORED], DEFAULT),
        ([], DEFAULT),
        ([verdict("unscored", 0.1)], answers(threshold=0.5)),
        ([verdict("unscored", 0.9)], answers(threshold=0.5)),
        ([verdict("unscored", 0.9, S4=0.9)], OWN),
    ],
)
def test_no_verdict_is_no_decision(verdicts: list[Verdict], policy: Policy) -> None:
    with pytest.raises(UpstreamUnavailable, match="safety: gave no verdict on the response"):
        decide(verdicts, Direction.RESPONSE, policy)


@pytest.mark.parametrize(
    ("given", "policy", "lacking"),
    [
        (verdict("safe"), OWN, "no score for S4, S7, which"),
        (verdict("safe", None, S4=0.0), OWN, "no score for S7, which"),
        (verdict("safe", None, S4=0.0), answers(threshold=0.7), "no score, which"),
    ],
)
def test_threshold_without_any_score_is_no_decision(given: Verdict, policy: Policy, lacking: str) -> None:
    for verdicts in ([given], [SAFE, given]):
        with pytest.raises(UpstreamUnavailable, match=f"safety: gave {lacking} the policy has a threshold for, on"):
            decide(verdicts, Direction.RESPONSE, policy)
    assert decide([verdict("safe", None, S4=0.0, S7=0.0)], Direction.RESPONSE, OWN).allowed


def test_each_direction_has_its_own_rules() -> None:
    policy = Policy.model_validate({"prompt": {"threshold": 0.3}, "response": {"threshold": 0.6, "action": "redact"}})
    assert decide([verdict("safe", 0.4)], Direction.PROMPT, policy).action is Action.REFUSE
    assert decide([verdict("safe", 0.4)], Direction.RESPONSE, policy).action is Action.ALLOW
    assert decide([verdict("safe", 0.6)], Direction.RESPONSE, policy).action is Action.REDACT


@pytest.mark.parametrize("action", ["revise", "redact", "allow", "nonsense", None, [], 1])
@pytest.mark.parametrize("field", ["own", "category"])
def test_prompts_can_only_be_refused(action: Any, field: str) -> None:
    if action is None and field == "category":
        return  # the direction's own
    part = {"action": action} if field == "own" else {"categories": {"S1": {"action": action}}}
    with pytest.raises(ValidationError, match="refuse"):
        Policy.model_validate({"prompt": part})


def test_reason_names_the_categories_worst_first() -> None:
    decision = decide([verdict("unsafe", 0.95, S10=0.6, S2=0.1), UNSAFE], Direction.RESPONSE, DEFAULT)
    assert decision.reason == "The answer was classified as unsafe: Violent crimes (S1), Hate (S10)."


def test_category_below_every_threshold_is_named_when_it_is_all_there_is() -> None:
    assert decide([verdict("unsafe", 0.9, S2=0.1, X=0.2)], Direction.PROMPT, DEFAULT).categories == ("X",)
    bare = decide([verdict("unsafe", 0.9)], Direction.PROMPT, DEFAULT)
    assert bare.reason == "The prompt was classified as unsafe."


def test_reason_never_quotes_the_classifier() -> None:
    quoting = UNSAFE.model_copy(update={"reason": "because it says: secret"})
    assert "secret" not in decide([quoting], Direction.RESPONSE, DEFAULT).reason


def test_what_cannot_be_redacted_or_revised_is_refused() -> None:
    redacted = decide([verdict("unsafe", 0.95, S2=0.9)], Direction.RESPONSE, GRAVE)
    assert redacted.or_refuse() == Decision(Action.REFUSE, Direction.RESPONSE, ("S2",))
    allowed = Decision(Action.ALLOW, Direction.RESPONSE, ("S2",), shadowed=Action.REDACT)
    assert allowed.or_refuse() == allowed


@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        (["*"], "anything/at:all", True),
        (["fedward"], "fedward", True),
        (["fedward"], "fedward-2", False),
        (["other", "fedward-*"], "fedward-2", True),
        (["Fedward"], "fedward", False),
    ],
)
def test_models(patterns: list[str], name: str, allowed: bool) -> None:
    assert Policy.model_validate({"models": patterns}).allows_model(name) is allowed


def test_hash_follows_the_content_and_not_the_writing() -> None:
    written = answers(action="refuse", categories={"S2": {"threshold": 0.5}, "S1": {"threshold": 1}})
    otherwise = answers(categories={"S1": {"threshold": 1.0, "action": None}, "S2": {"threshold": 0.5}}, threshold=None)
    assert written.sha256 == otherwise.sha256
    assert answers(categories={"S2": {"threshold": 0.5}}).sha256 != written.sha256
    assert DEFAULT.sha256 == "cc03645252ab2b675f3da00761485b93225187754f9527375cd24ede0ee0ea2d"


score = st.floats(0, 1)
category = st.sampled_from([*HazardCategory, "X"])
any_verdict = st.builds(
    Verdict,
    outcome=st.sampled_from(Outcome),
    score=st.none() | score,
    threshold=st.none() | score,
    categories=st.dictionaries(category.map(str), score, max_size=5),
    model_id=st.just("test"),
)
any_direction = st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.none() | score,
        "action": st.sampled_from(["refuse", "revise", "redact"]),
        "categories": st.dictionaries(
            st.sampled_from(HazardCategory),
            st.fixed_dictionaries(
                {}, optional={"threshold": score, "action": st.sampled_from(["refuse", "revise", "redact"])}
            ),
        ),
    },
)
any_policy = st.builds(
    lambda response, shadow: Policy.model_validate({"response": response, "shadow": shadow}),
    any_direction,
    st.booleans(),
)


def severity(verdicts: list[Verdict], policy: Policy) -> int:
    """How bad what would happen is, shadow or not."""
    try:
        decision = decide(verdicts, Direction.RESPONSE, policy)
    except UpstreamUnavailable:
        return SEVERITY.index(UNAVAILABLE)
    return SEVERITY.index(decision.shadowed or decision.action)


@given(st.lists(any_verdict, min_size=1, max_size=3), any_policy, st.data())
def test_raising_a_score_never_makes_a_decision_milder(
    verdicts: list[Verdict], policy: Policy, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(verdicts) - 1))
    at = verdicts[position]
    name = data.draw(st.sampled_from(["score", *sorted(at.categories)]))
    if name == "score":
        update: dict[str, Any] = {"score": at.score if at.score is None else data.draw(st.floats(at.score, 1))}
    else:
        update = {"categories": at.categories | {name: data.draw(st.floats(at.categories[name], 1))}}
    raised = [*verdicts[:position], at.model_copy(update=update), *verdicts[position + 1 :]]
    assert severity(raised, policy) >= severity(verdicts, policy)


@given(st.lists(any_verdict, max_size=3), any_verdict, any_policy)
def test_text_with_a_part_without_verdict_never_goes_on(
    verdicts: list[Verdict], other: Verdict, policy: Policy
) -> None:
    unscored = other.model_copy(update={"outcome": Outcome.UNSCORED})
    assert severity([*verdicts, unscored], policy) in (SEVERITY.index(UNAVAILABLE), SEVERITY.index(Action.REFUSE))


def decision(action: Action, direction: Direction) -> Decision:
    return Decision(action, direction)


def test_ledger_lets_out_what_was_allowed() -> None:
    ledger = Ledger()
    ledger.record(decision(Action.ALLOW, Direction.PROMPT))
    ledger.record(decision(Action.ALLOW, Direction.RESPONSE), "hello")
    assert ledger.release("hello") == "hello"


@pytest.mark.parametrize(
    "decisions",
    [
        [],
        [(Action.ALLOW, Direction.PROMPT)],
        [(Action.REFUSE, Direction.PROMPT), (Action.ALLOW, Direction.RESPONSE)],
        [(Action.ALLOW, Direction.PROMPT), (Action.REFUSE, Direction.RESPONSE)],
        [(Action.ALLOW, Direction.PROMPT), (Action.ALLOW, Direction.RESPONSE)],
    ],
)
def test_ledger_withholds_what_no_decision_covers(decisions: list[tuple[Action, Direction]]) -> None:
    name = "fedward_gateway_characters_released_before_verdict_total"
    before = REGISTRY.get_sample_value(name) or 0
    ledger = Ledger()
    for action, direction in decisions:
        ledger.record(decision(action, direction), "hel")
    with pytest.raises(UncheckedRelease):
        ledger.release("hello")
    assert REGISTRY.get_sample_value(name) == before + len("hello")
