"""Where counters live: in this process, or in a Redis that all replicas share; and what to do when that is away."""

import time
from typing import Any, NamedTuple

from limits.aio.storage import MemoryStorage
from limits.errors import StorageError
from prometheus_client import Counter, Gauge

from services.common.logs import get_logger
from services.contracts.errors import UpstreamUnavailable

SERVICE = "limits"
TIMEOUT_SECONDS = 0.5  # of one command; a request waits this long for a Redis that hangs
CONNECTIONS = 16
TURN_SECONDS = 2.0  # longest wait for one of the connections: a burst of requests is no sign that Redis is away
PAUSE_SECONDS = 1.0  # between attempts at a Redis that is away, so that not every request waits for it

FAILURES = Counter("fedward_gateway_limit_storage_failures_total", "Commands that the counters' Redis did not answer")
LOCAL = Counter("fedward_gateway_limits_counted_locally_total", "Counts made in memory because Redis was away")
AWAY = Gauge("fedward_gateway_limit_storage_away", "1 while the counters' Redis cannot be reached")


class Count(NamedTuple):
    """A counter's new value, and whether it stands in this process only."""

    value: int
    local: bool


class CounterStorage:
    """Counters by key.

    Args:
        url: of Redis; None to count in memory.
        fall_back: count in memory while Redis is away, each replica for itself, rather than refuse.
    """

    def __init__(self, url: str | None, *, fall_back: bool) -> None:
        self._memory = MemoryStorage()
        self._redis = _redis(url) if url else None
        self._fall_back = fall_back
        self._away_since: float | None = None
        self._next_attempt = 0.0

    @property
    def problem(self) -> str | None:
        """Why counts are not shared at present; None when they are as configured."""
        if self._away_since is None:
            return None
        return f"{SERVICE}: Redis has been away for {time.monotonic() - self._away_since:.0f} s"

    async def add(self, key: str, amount: int, *, expiry_seconds: int) -> Count:
        """Add to a counter and return its new value, in one step.

        Raises:
            UpstreamUnavailable: Redis is away and ``fall_back`` is off.
        """
        if self._redis is None:
            return Count(await self._memory.incr(key, expiry_seconds, amount), local=True)
        if time.monotonic() >= self._next_attempt:
            try:
                return Count(await self._raise(key, amount, expiry_seconds), local=False)
            except StorageError as error:
                self._lost(error)
        if not self._fall_back:
            raise UpstreamUnavailable(SERVICE, "the counters cannot be reached, so the request cannot be admitted")
        LOCAL.inc()
        return Count(await self._memory.incr(key, expiry_seconds, amount), local=True)

    async def adjust(self, key: str, amount: int, *, expiry_seconds: int, local: bool) -> None:
        """Correct a counter where it was added to (``local`` of its Count): elsewhere it would be a present.

        Raises:
            UpstreamUnavailable: it stands in Redis, which is away.
        """
        if local or self._redis is None:
            await self._memory.incr(key, expiry_seconds, amount)
            return
        try:  # once: a correction that is made twice lets more through than the limit
            await self._redis.incr(key, expiry_seconds, amount)
        except StorageError as error:
            self._lost(error)
            raise UpstreamUnavailable(SERVICE, "a counter cannot be corrected") from error

    async def _raise(self, key: str, amount: int, expiry_seconds: int) -> int:
        """Count in Redis; a second time when the first found a kept connection closed. Counting twice errs safely."""
        assert self._redis is not None
        try:
            count: int = await self._redis.incr(key, expiry_seconds, amount)
        except StorageError:
            count = await self._redis.incr(key, expiry_seconds, amount)
        self._found()
        return count

    async def close(self) -> None:
        """Close the connections."""
        if self._redis is not None:
            await self._redis.bridge.storage.aclose(close_connection_pool=True)

    def _lost(self, error: StorageError) -> None:
        FAILURES.inc()
        self._next_attempt = time.monotonic() + PAUSE_SECONDS
        if self._away_since is None:
            self._away_since = time.monotonic()
            AWAY.set(1)
            policy = "each replica counts for itself" if self._fall_back else "requests are refused"
            get_logger().error("the counters' Redis is away", reason=type(error.storage_error).__name__, policy=policy)

    def _found(self) -> None:
        if self._away_since is not None:
            get_logger().warning("the counters' Redis is back", away_seconds=time.monotonic() - self._away_since)
            self._away_since = None
            AWAY.set(0)


def _redis(url: str) -> Any:
    """Redis behind the ``limits`` library; imported here because it brings 9 MB."""
    from limits.aio.storage import RedisStorage
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # Commands take turns on a few connections; redis's usual pool fails the 101st command at a time.
    pool = BlockingConnectionPool.from_url(
        url.replace("redis+unix://", "unix://"),
        max_connections=CONNECTIONS,
        timeout=TURN_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),  # what may be repeated is decided above
    )
    options: dict[str, Any] = {"connection_pool": pool}
    return RedisStorage(f"async+{url}", wrap_exceptions=True, implementation="redispy", **options)
