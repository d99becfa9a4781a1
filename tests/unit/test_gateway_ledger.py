"""The ledger behind every release: an account for each channel of each choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.metrics import Lane, Ledger, UncheckedRelease
from gateway.policy import Action, Decision, Direction

PROMPT = Decision(Action.ALLOW, Direction.PROMPT)
ALLOW = Decision(Action.ALLOW, Direction.RESPONSE)
REFUSE = Decision(Action.REFUSE, Direction.RESPONSE)


def ledger() -> Ledger:
    made = Ledger()
    made.record(PROMPT)
    return made


@pytest.mark.parametrize("lane", [(1, "content"), (0, "reasoning"), (1, "reasoning")])
def test_allowance_of_one_lane_is_none_for_another(lane: Lane) -> None:
    kept = ledger()
    kept.record(ALLOW, 5, lane)
    with pytest.raises(UncheckedRelease):
        kept.release("hello")
    assert kept.release("hello", lane) == "hello"


def test_refused_choice_releases_nothing_more() -> None:
    kept = ledger()
    for lane in ((0, "content"), (0, "tool_calls"), (1, "content")):
        kept.record(ALLOW, 5, lane)
    kept.record(REFUSE, 9, (0, "content"))
    kept.record(ALLOW, 9, (0, "content"))
    assert kept.release("hello", (1, "content")) == "hello"
    for channel in ("content", "tool_calls"):
        with pytest.raises(UncheckedRelease):
            kept.release("hello", (0, channel))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 9))))
def test_never_more_leaves_than_was_allowed(steps: list[tuple[bool, int, int]]) -> None:
    kept = ledger()
    allowed, released = [0, 0, 0], [0, 0, 0]
    for is_release, index, size in steps:
        if not is_release:
            kept.record(ALLOW, size, (index, "content"))
            allowed[index] += size
            continue
        try:
            kept.release("x" * size, (index, "content"))
            released[index] += size
        except UncheckedRelease:
            assert released[index] + size > allowed[index], "what was allowed leaves"
        assert released[index] <= allowed[index]
