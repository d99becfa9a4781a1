"""How much a tenant may ask for: requests and tokens per window of time, counted in memory or in one Redis for all.

A request is counted, and its likely tokens are reserved, before any work starts, so that parallel requests cannot all
slip under a limit; when it is over, the reservation becomes the true count. Each window is a counter of its own, named
by its number since 1970 (``limits`` counts, we name): a reservation is given back to the window that it was taken from,
however long the answer took. The counter is raised first and looked at after, in one step of the storage, so that
replicas with one Redis never admit more than the limit between them.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from limits import RateLimitItem

from gateway.limit_storage import CounterStorage
from gateway.quotas import Kind, LimitsSettings, Quota, read_quotas
from gateway.watched_file import WatchedFile
from services.common.logs import get_logger
from services.contracts.errors import QuotaExceeded, UpstreamUnavailable


class Window(NamedTuple):
    """One counter: a limit, the tenant's window that it holds for, and what stood there after ours was added."""

    kind: Kind
    limit: RateLimitItem
    key: str
    ends_at: float
    taken: int
    local: bool

    @property
    def remaining(self) -> int:
        """What is left of the limit."""
        return max(0, self.limit.amount - self.taken)

    @property
    def seconds_left(self) -> float:
        """Until the window ends and the next begins at 0."""
        return max(0.0, self.ends_at - time.time())


class Grant:
    """Leave to do one request's work: what was reserved for it, and the headers that its answer carries."""

    def __init__(self, windows: Sequence[Window], reserved: int) -> None:
        self.headers = ratelimit_headers(windows)
        self.tokens = reserved

    def used(self, tokens: int) -> None:
        """Say how many tokens it took in the end. Unsaid, the reservation counts: leaving early is not for free."""
        self.tokens = tokens


class Limiter:
    """Counts requests and tokens by tenant.

    Raises:
        ConfigError: the limits file cannot be read.
    """

    def __init__(self, settings: LimitsSettings) -> None:
        self._quotas = WatchedFile(settings.limits_file, read_quotas) if settings.limits_file else None
        url = settings.limits_url.get_secret_value() if settings.limits_url else None
        self._storage = CounterStorage(url, fall_back=settings.limits_failure == "local")
        if self._quotas is None:
            get_logger().info("no limits are set; --limits-file sets them")

    @property
    def files(self) -> list[WatchedFile[Any]]:
        """The files to be watched."""
        return [self._quotas] if self._quotas else []

    @property
    def problem(self) -> str | None:
        """Why counts are not shared at present: Redis is away."""
        return self._storage.problem if self._quotas else None

    @asynccontextmanager
    async def admit(self, tenant: str, tokens: int) -> AsyncIterator[Grant]:
        """Count one request and reserve ``tokens`` for it; at the end of the block, settle for what it used.

        Raises:
            QuotaExceeded: one of the tenant's limits is met; then nothing is counted.
            UpstreamUnavailable: the counters cannot be reached, and the policy is to refuse.
        """
        windows = await self._reserve(tenant, tokens)
        grant = Grant(windows, tokens)
        try:
            yield grant
        finally:
            if grant.tokens != tokens:
                await self._settle([window for window in windows if window.kind == "tokens"], grant.tokens - tokens)

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._storage.close()

    async def _reserve(self, tenant: str, tokens: int) -> list[Window]:
        quota = self._quotas.current.of(tenant) if self._quotas else Quota()
        costs: dict[Kind, int] = {"requests": 1, "tokens": tokens}
        wanted = [(kind, limit, cost) for kind, cost in costs.items() for limit in quota.items(kind)]
        windows = await asyncio.gather(*(self._count(tenant, *one) for one in wanted))
        met = [window for window in windows if window.taken > window.limit.amount]
        if met:
            # Given back, so that somebody who keeps asking is not locked out for longer by it.
            await asyncio.gather(*(self._adjust(window, -costs[window.kind]) for window in windows))
            raise _exceeded(max(met, key=lambda window: window.seconds_left), windows, tokens)
        return windows

    async def _count(self, tenant: str, kind: Kind, limit: RateLimitItem, cost: int) -> Window:
        seconds = limit.get_expiry()
        number = int(time.time() // seconds)
        key = limit.key_for(kind, tenant, number)
        # Kept for a second length: an answer that began in this window may be settled in the next.
        taken, local = await self._storage.add(key, cost, expiry_seconds=2 * seconds)
        return Window(kind, limit, key, (number + 1) * seconds, taken, local)

    async def _adjust(self, window: Window, amount: int) -> None:
        expiry = 2 * window.limit.get_expiry()
        await self._storage.adjust(window.key, amount, expiry_seconds=expiry, local=window.local)

    async def _settle(self, windows: Sequence[Window], difference: int) -> None:
        try:
            await asyncio.gather(*(self._adjust(window, difference) for window in windows))
        except UpstreamUnavailable as error:  # the reservation stays: too much is counted rather than too little
            get_logger().warning("tokens not settled", difference=difference, error=error.message)


def ratelimit_headers(windows: Sequence[Window]) -> dict[str, str]:
    """The headers that OpenAI sends, for the window of each kind with the smallest share left.

    Source: OpenAI API, "Rate limits in headers": limit, remaining, and the time until it is full again (``6m0s``).
    """
    headers = {}
    kinds: tuple[Kind, ...] = ("requests", "tokens")
    for kind in kinds:
        of_kind = [window for window in windows if window.kind == kind]
        if of_kind:
            window = min(of_kind, key=lambda window: window.remaining / window.limit.amount)
            headers[f"x-ratelimit-limit-{kind}"] = str(window.limit.amount)
            headers[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(window.seconds_left)
    return headers


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: ``17ms``, ``1s``, ``6m0s``, ``1h0m0s``; rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _exceeded(window: Window, windows: Sequence[Window], tokens: int) -> QuotaExceeded:
    retry = max(1, math.ceil(window.seconds_left))
    if window.kind == "tokens" and tokens > window.limit.amount:
        message = (
            f"this request may need {tokens} tokens, more than the limit of {window.limit}; "
            "shorten the prompt or lower max_tokens"
        )
    else:
        message = f"limit of {window.kind} met: {window.limit}; try again in {retry} s"
    return QuotaExceeded(message, retry_after_seconds=retry, headers=ratelimit_headers(windows))
