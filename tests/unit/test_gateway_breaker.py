"""The breaker against a model of what it promises, whatever order calls begin and end in."""

import asyncio
from contextlib import AbstractContextManager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import REGISTRY

from gateway.breaker import LASTING_SECONDS, Breaker
from gateway.upstreams import PassedOn
from services.contracts.errors import UpstreamUnavailable

LIMIT, SECONDS = 3, 5.0
FAILURE = UpstreamUnavailable("x", "cannot be reached")
ANSWERS = st.sampled_from([None, PassedOn("x", 404)])
NEITHER = st.sampled_from([asyncio.CancelledError(), GeneratorExit(), ZeroDivisionError()])


class BreakerMachine(RuleBasedStateMachine):
    """``failures`` in a row, since when, and the time of the last call let through are all that the model knows."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker("x", LIMIT, SECONDS, clock=lambda: self.now)
        self.failures = 0
        self.failing_since = 0.0
        self.open = False
        self.quiet_until = 0.0
        self.calls: list[AbstractContextManager[None]] = []

    @rule(seconds=st.sampled_from([0.1, 1.0, SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begin(self) -> None:
        call = self.breaker.watching()
        if self.open and self.now < self.quiet_until:
            with pytest.raises(UpstreamUnavailable, match="x: left alone") as refusal:
                call.__enter__()
            assert 1 <= int(refusal.value.headers["retry-after"]) <= SECONDS + 1
            return
        call.__enter__()
        self.calls.append(call)
        if self.open:  # a trial
            self.quiet_until = self.now + SECONDS

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self._end(data, FAILURE)
        self.failing_since = self.failing_since if self.failures else self.now
        self.failures += 1
        if not self.open and self.failures >= LIMIT and self.now - self.failing_since >= LASTING_SECONDS:
            self.open = True
            self.quiet_until = self.now + SECONDS

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), answer=ANSWERS)
    def answer(self, data: st.DataObject, answer: Exception | None) -> None:
        self._end(data, answer)
        self.failures, self.open = 0, False

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), error=NEITHER)
    def leave(self, data: st.DataObject, error: BaseException) -> None:
        self._end(data, error)

    @precondition(lambda self: self.calls)
    @rule()
    def begin_to_answer(self) -> None:
        self.breaker.answering()
        self.failures, self.open = min(self.failures, LIMIT - 1), False

    @invariant()
    def tells_of_its_state(self) -> None:
        assert (self.breaker.problem is None) == (not self.open or self.now >= self.quiet_until)
        assert REGISTRY.get_sample_value("fedward_gateway_breaker_open", {"upstream": "x"}) == self.open

    def _end(self, data: st.DataObject, error: BaseException | None) -> None:
        call = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        if error is None:
            assert not call.__exit__(None, None, None)
        else:
            assert not call.__exit__(type(error), error, None), "errors pass through"


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_without_a_limit_it_never_opens() -> None:
    breaker = Breaker("x", 0, SECONDS)
    for _ in range(100):
        with pytest.raises(UpstreamUnavailable, match="cannot be reached"), breaker.watching():
            raise FAILURE
    breaker.answering()
    assert breaker.problem is None
