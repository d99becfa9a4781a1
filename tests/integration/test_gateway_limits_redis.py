"""Limits of several replicas on one real Redis, and what happens when it goes away."""

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from gateway.limits import Limiter
from gateway.quotas import LimitsSettings
from services.contracts.errors import QuotaExceeded, UpstreamUnavailable
from tests.fakes.redis_server import RedisServer

FILE = '[default]\nrequests = "50/day"\ntokens = "1000/day"\n'


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def settings(folder: Path, url: str, failure: str = "refuse", content: str = FILE) -> LimitsSettings:
    path = folder / "limits.toml"
    path.write_text(content)
    return LimitsSettings.model_validate({"limits_file": path, "limits_url": url, "limits_failure": failure})


def run(values: LimitsSettings, work: Callable[[Limiter], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        limiter = Limiter(values)
        try:
            await work(limiter)
        finally:
            await limiter.close()

    asyncio.run(whole())


async def ask(limiter: Limiter, tokens: int = 1, used: int | None = None) -> bool:
    """Whether it was admitted."""
    try:
        async with limiter.admit("acme", tokens) as grant:
            if used is not None:
                grant.used(used)
            await asyncio.sleep(0)
    except QuotaExceeded:
        return False
    return True


def _replica(values: LimitsSettings, start: Barrier, tokens: int, results: Any) -> None:
    async def work(limiter: Limiter) -> None:
        await asyncio.to_thread(start.wait)
        results.put(sum(await asyncio.gather(*(ask(limiter, tokens) for _ in range(60)))))

    run(values, work)


@pytest.mark.parametrize(("tokens", "limit"), [(1, 50), (30, 33)], ids=["requests", "tokens"])
def test_replicas_together_never_admit_more_than_the_limit(
    redis: RedisServer, tmp_path: Path, tokens: int, limit: int
) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    values = settings(tmp_path, redis.url)
    replicas = [spawn.Process(target=_replica, args=(values, start, tokens, results)) for _ in range(2)]
    for replica in replicas:
        replica.start()
    admitted = sum(results.get(timeout=60) for _ in replicas)
    for replica in replicas:
        replica.join(timeout=30)
    # Requests that are refused at the same time may keep each other out at the very edge; never in.
    assert limit - 5 <= admitted <= limit

    async def fill_up(limiter: Limiter) -> None:
        more = sum([await ask(limiter, tokens) for _ in range(60)])
        assert admitted + more == limit

    run(values, fill_up)


def test_greatest_request_is_refused_and_harms_nobody(redis: RedisServer, tmp_path: Path) -> None:
    """The most that the readers accept: 128 answers to each of 100 prompts, of 2**31 tokens each."""

    async def work(limiter: Limiter) -> None:
        assert not await ask(limiter, tokens=12_800 * 2**31)
        assert await ask(limiter, tokens=1000)

    run(settings(tmp_path, redis.url), work)


def test_settlement_is_seen_by_the_other_replica(redis: RedisServer, tmp_path: Path) -> None:
    async def work(limiter: Limiter) -> None:
        other = Limiter(settings(tmp_path, redis.url))
        assert await ask(limiter, 900, used=100)
        assert await ask(other, 900)
        assert not await ask(limiter, 1)
        await other.close()

    run(settings(tmp_path, redis.url), work)


def test_without_redis_requests_are_refused_until_it_is_back(redis: RedisServer, tmp_path: Path) -> None:
    async def work(limiter: Limiter) -> None:
        assert await ask(limiter)
        redis.stop()
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable, match="limits: the counters cannot be reached") as caught:
                await ask(limiter)
        assert caught.value.http_status == 503
        assert limiter.problem is not None
        assert REGISTRY.get_sample_value("fedward_gateway_limit_storage_away") == 1
        redis.start()
        await admitted_again(limiter)
        assert limiter.problem is None

    run(settings(tmp_path, redis.url), work)


async def admitted_again(limiter: Limiter) -> None:
    for _ in range(300):
        try:
            assert await ask(limiter)
        except UpstreamUnavailable:
            await asyncio.sleep(0.02)
        else:
            return
    pytest.fail("still refused although Redis is back")


def test_redis_that_restarted_between_two_requests_is_not_noticed(redis: RedisServer, tmp_path: Path) -> None:
    async def work(limiter: Limiter) -> None:
        assert await ask(limiter)
        redis.stop()
        redis.start()
        assert await ask(limiter)

    run(settings(tmp_path, redis.url), work)


def test_redis_that_hangs_is_away(redis: RedisServer, tmp_path: Path) -> None:
    async def work(limiter: Limiter) -> None:
        assert await ask(limiter)
        redis.signal(signal.SIGSTOP)
        with pytest.raises(UpstreamUnavailable):
            await ask(limiter)
        redis.signal(signal.SIGCONT)
        await admitted_again(limiter)

    run(settings(tmp_path, redis.url), work)


def test_local_policy_counts_on_in_memory(redis: RedisServer, tmp_path: Path) -> None:
    before = REGISTRY.get_sample_value("fedward_gateway_limits_counted_locally_total") or 0.0

    async def work(limiter: Limiter) -> None:
        redis.stop()
        admitted = sum([await ask(limiter) for _ in range(60)])
        assert admitted == 50  # limited, if by this replica alone
        assert limiter.problem is not None
        assert (REGISTRY.get_sample_value("fedward_gateway_limits_counted_locally_total") or 0.0) >= before + 100

    run(settings(tmp_path, redis.url, "local"), work)


def test_what_was_reserved_in_redis_is_no_present_to_the_memory(redis: RedisServer, tmp_path: Path) -> None:
    async def work(limiter: Limiter) -> None:
        async with limiter.admit("acme", 900) as grant:
            redis.stop()
            grant.used(0)
        assert await ask(limiter, 1000)
        assert not await ask(limiter, 1)

    run(settings(tmp_path, redis.url, "local"), work)
