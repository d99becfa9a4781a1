"""A circuit breaker: a service that failed several times in a row is left alone for a while.

PyPI's (purgatory, circuitbreaker, pybreaker) let every waiting call through as the "one" trial, or need Tornado.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from services.common.logs import get_logger
from services.contracts.errors import UpstreamRejected, UpstreamUnavailable

OPEN = Gauge("fedward_gateway_breaker_open", "1 while a service is not called but for trials", ["upstream"])

LASTING_SECONDS = 1.0  # a row of failures that is over sooner is a blip


class Breaker:
    """Watches the calls of one service. While it is open every call fails at once; nothing goes unchecked.

    A thousand streams have five failures in a row within a millisecond: only when the row lasts does the breaker open.
    Clients are told to come back at different times, for all of them at once would be the next failure.

    One trial is let through after ``seconds``, and while nothing has come of it, another one each time as long: a
    trial that hangs, or whose client leaves, delays the next and needs no bookkeeping. One answer closes the breaker.

    Args:
        upstream: the service's name.
        failures: how many UpstreamUnavailable in a row, over a second or more, open it; 0: it never opens.
        seconds: between trials.
        clock: for tests.
    """

    def __init__(
        self, upstream: str, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._upstream, self._limit, self._seconds, self._clock = upstream, failures, seconds, clock
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._open = False
        self._next_trial = 0.0  # while open
        OPEN.labels(upstream).set(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Make a call inside the block; raises UpstreamUnavailable in its place while the service is left alone."""
        if self.problem:
            refusal = UpstreamUnavailable(self._upstream, self.problem)
            refusal.headers = {"retry-after": str(random.randint(1, 1 + round(self._seconds)))}
            raise refusal
        if self._open:  # this is a trial
            self._next_trial = self._clock() + self._seconds
        try:
            yield
        except UpstreamUnavailable:
            self._failed()
            raise
        except UpstreamRejected:  # a proper answer
            self._answered(0)
            raise
        self._answered(0)

    def answering(self) -> None:
        """Note that a long answer has begun: enough to close the breaker, though the next failure opens it again."""
        self._answered(self._limit - 1)

    @property
    def problem(self) -> str | None:
        """Why the service is not called at present; None when the next call goes through."""
        if not self._open or self._clock() >= self._next_trial:
            return None
        return f"left alone for a moment after {self._failures} failures in a row"

    def _failed(self) -> None:
        now = self._clock()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        lasting = now - self._failing_since >= min(LASTING_SECONDS, self._seconds)
        if not self._open and lasting and 0 < self._limit <= self._failures:
            self._open = True
            self._next_trial = now + self._seconds
            OPEN.labels(self._upstream).set(1)
            get_logger().warning("service left alone", upstream=self._upstream, failures=self._failures)

    def _answered(self, failures: int) -> None:
        if self._open:
            self._open = False
            OPEN.labels(self._upstream).set(0)
            get_logger().info("service answers again", upstream=self._upstream)
        self._failures = min(self._failures, failures)
