"""The ledger behind every release: an account for each channel of each choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.metrics import UNSAFE, Lane, Ledger, UncheckedRelease, count
from gateway.policy import Action, Decision, Direction

PROMPT = Decision(Action.ALLOW, Direction.PROMPT)
ALLOW = Decision(Action.ALLOW, Direction.RESPONSE)
REDACT = Decision(Action.REDACT, Direction.RESPONSE)
REFUSE = Decision(Action.REFUSE, Direction.RESPONSE)


def ledger() -> Ledger:
    made = Ledger()
    made.record(PROMPT)
    return made


@pytest.mark.parametrize("lane", [(1, "content"), (0, "reasoning"), (1, "reasoning")])
def test_allowance_of_one_lane_is_none_for_another(lane: Lane) -> None:
    kept = ledger()
    kept.record(ALLOW, "hello", lane)
    with pytest.raises(UncheckedRelease):
        kept.release("hello")
    assert kept.release("hello", lane) == "hello"


def test_refused_choice_releases_nothing_more() -> None:
    kept = ledger()
    for lane in ((0, "content"), (0, "tool_calls"), (1, "content")):
        kept.record(ALLOW, "hello", lane)
    kept.record(REFUSE, "and more", (0, "content"))
    kept.record(ALLOW, "and more", (0, "content"))
    assert kept.release("hello", (1, "content")) == "hello"
    for channel in ("content", "tool_calls"):
        with pytest.raises(UncheckedRelease):
            kept.release("hello", (0, channel))


@pytest.mark.parametrize("action", [Action.REDACT, Action.REVISE, Action.REFUSE])
def test_text_that_is_not_allowed_never_leaves_though_others_of_its_length_may(action: Action) -> None:
    kept = ledger()
    kept.record(Decision(action, Direction.RESPONSE), "a bad one")
    if action is not Action.REFUSE:
        kept.record(ALLOW, "[removed]")
    with pytest.raises(UncheckedRelease):
        kept.release("a bad one")


def test_order_counts() -> None:
    kept = ledger()
    kept.record(ALLOW, "one two ")
    with pytest.raises(UncheckedRelease):
        kept.release("two ")
    assert kept.release("one ") == "one "
    assert kept.release("two ") == "two "


@given(st.lists(st.tuples(st.sampled_from("arl"), st.integers(0, 2), st.text("xy", max_size=3))))
def test_nothing_leaves_but_what_was_allowed(steps: list[tuple[str, int, str]]) -> None:
    """Steps: a text is allowed, is to be redacted, or is about to leave, each in one of three choices."""
    kept = ledger()
    allowed, released = ["", "", ""], ["", "", ""]
    for step, index, text in steps:
        lane = (index, "content")
        if step == "l":
            try:
                released[index] += kept.release(text, lane)
            except UncheckedRelease:
                assert not allowed[index].startswith(released[index] + text), "what was allowed leaves"
        else:
            kept.record(ALLOW if step == "a" else REDACT, text, lane)
            allowed[index] += text if step == "a" else ""
        assert allowed[index].startswith(released[index])


@pytest.mark.parametrize(
    ("categories", "action", "shadowed", "label"),
    [
        (("S9",), Action.REFUSE, None, "S9"),
        ((), Action.REFUSE, None, "none"),
        (("a classifier's own",), Action.REDACT, None, "other"),
        (("S1",), Action.ALLOW, Action.REFUSE, "S1"),
        (("S2",), Action.ALLOW, None, None),
    ],
)
def test_what_was_found_is_counted_by_category(
    categories: tuple[str, ...], action: Action, shadowed: Action | None, label: str | None
) -> None:
    def counted() -> dict[tuple[str, ...], float]:
        samples = [sample for metric in UNSAFE.collect() for sample in metric.samples if sample.name.endswith("_total")]
        return {tuple(sample.labels.values()): sample.value for sample in samples}

    before = counted()
    count(Decision(action, Direction.PROMPT, categories=categories, shadowed=shadowed))
    grown = {labels for labels, value in counted().items() if value > before.get(labels, 0)}
    outcome = "shadowed" if shadowed else action.value
    assert grown == ({("prompt", label, outcome)} if label else set())
