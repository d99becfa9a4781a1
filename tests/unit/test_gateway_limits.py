"""Limits in one process: what is counted when, what the client is told, what a limits file may say."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.limits import Limiter, duration
from gateway.quotas import LimitsSettings, Quotas, estimate_tokens, read_quotas
from services.contracts.errors import ConfigError, QuotaExceeded

FILE = """
[default]
requests = "3/day"
tokens = "100/day"

[tenants.acme]
requests = "5/day; 1000/month"

[tenants.free]
"""


@pytest.fixture
def limits_file(tmp_path: Path) -> Path:
    path = tmp_path / "limits.toml"
    path.write_text(FILE)
    return path


def with_limiter(path: Path | None, work: Callable[[Limiter], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def run() -> Any:
        limiter = Limiter(LimitsSettings(limits_file=path, **settings))
        try:
            return await work(limiter)
        finally:
            await limiter.close()

    return asyncio.run(run())


async def ask(limiter: Limiter, tenant: str = "somebody", tokens: int = 1, used: int | None = None) -> dict[str, str]:
    async with limiter.admit(tenant, tokens) as grant:
        if used is not None:
            grant.used(used)
        return grant.headers


def test_requests_are_counted_by_tenant(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        for left in ("2", "1", "0"):
            assert (await ask(limiter))["x-ratelimit-remaining-requests"] == left
        with pytest.raises(QuotaExceeded, match=r"limit of requests met: 3 per 1 day; try again in \d+ s"):
            await ask(limiter)
        await ask(limiter, "another")
        for _ in range(5):
            await ask(limiter, "acme")
        with pytest.raises(QuotaExceeded):
            await ask(limiter, "acme")
        for _ in range(50):
            assert await ask(limiter, "free") == {}

    with_limiter(limits_file, work)


def test_refusal_carries_what_openai_clients_read(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> QuotaExceeded:
        for _ in range(3):
            await ask(limiter, tokens=10)
        with pytest.raises(QuotaExceeded) as caught:
            await ask(limiter, tokens=10)
        return caught.value

    error: QuotaExceeded = with_limiter(limits_file, work)
    assert error.http_status == 429
    assert error.body()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(error.headers["retry-after"]) <= 86_400
    headers = {name: value for name, value in error.headers.items() if "reset" not in name and name != "retry-after"}
    assert headers == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
    }


def test_parallel_requests_cannot_slip_under_a_token_limit(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        admitted, gate = 0, asyncio.Event()

        async def one() -> None:
            nonlocal admitted
            async with limiter.admit("acme", 30):
                admitted += 1
                await gate.wait()

        limiter_file_quota = limiter._quotas
        assert limiter_file_quota is not None
        limiter_file_quota.current = Quotas.model_validate({"default": {"tokens": "100/day"}})
        tasks = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(0.05)
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert admitted == 3
        assert sum(isinstance(result, QuotaExceeded) for result in results) == 17

    with_limiter(limits_file, work)


def test_reservation_is_settled(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        await ask(limiter, tokens=90, used=10)
        assert (await ask(limiter, tokens=50))["x-ratelimit-remaining-tokens"] == "40"  # 10 + 50 of 100
        with pytest.raises(QuotaExceeded, match="limit of tokens met"):
            await ask(limiter, tokens=41)
        await ask(limiter, tokens=40, used=200)  # an answer may turn out longer than was thought
        with pytest.raises(QuotaExceeded):
            await ask(limiter, tokens=1)

    with_limiter(limits_file, work)


def test_leaving_early_keeps_the_reservation(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        with pytest.raises(RuntimeError, match="left"):
            async with limiter.admit("somebody", 70):
                raise RuntimeError("left")
        with pytest.raises(QuotaExceeded):
            await ask(limiter, tokens=31)
        await ask(limiter, tokens=30)

    with_limiter(limits_file, work)


def test_refused_request_is_given_back(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        for _ in range(20):
            with pytest.raises(QuotaExceeded, match="may need 101 tokens"):
                await ask(limiter, tokens=101)
        assert (await ask(limiter, tokens=100))["x-ratelimit-remaining-requests"] == "2"

    with_limiter(limits_file, work)


def test_a_window_ends(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text('[default]\nrequests = "2/second"')

    async def work(limiter: Limiter) -> None:
        admitted = 0
        for _ in range(400):
            try:
                await ask(limiter)
                admitted += 1
            except QuotaExceeded:
                if admitted >= 4:
                    return
            await asyncio.sleep(0.01)
        pytest.fail(f"only {admitted} were admitted in three windows")

    with_limiter(path, work)


def _write(path: Path, content: str) -> None:
    path.write_text(content)


def test_limits_are_reloaded(limits_file: Path) -> None:
    async def work(limiter: Limiter) -> None:
        (file,) = limiter.files
        _write(limits_file, '[default]\nrequests = "1/day"')
        file.look()
        file.look()
        await ask(limiter)
        with pytest.raises(QuotaExceeded, match="1 per 1 day"):
            await ask(limiter)
        _write(limits_file, '[default]\nrequests = "many"')
        file.look()
        file.look()
        assert "many" in (file.problem or "")
        with pytest.raises(QuotaExceeded, match="1 per 1 day"):  # a slip does not lift the limit
            await ask(limiter)

    with_limiter(limits_file, work)


def test_file_that_breaks_its_parser_leaves_the_limits_in_force(limits_file: Path) -> None:
    """Not every parser's error is one that readers expect: so deep a list is a RecursionError."""

    async def work(limiter: Limiter) -> None:
        (file,) = limiter.files
        _write(limits_file, f"default = {'[' * 5000}{']' * 5000}")
        file.look()
        file.look()
        assert file.problem == f"{limits_file}: RecursionError"
        assert (await ask(limiter))["x-ratelimit-limit-requests"] == "3"
        _write(limits_file, '[default]\nrequests = "7/day"\n')
        file.look()
        file.look()
        assert file.problem is None
        assert (await ask(limiter))["x-ratelimit-limit-requests"] == "7"

    with_limiter(limits_file, work)


def test_without_a_file_there_is_no_limit() -> None:
    async def work(limiter: Limiter) -> None:
        assert await ask(limiter, tokens=10**9) == {}
        assert limiter.problem is None

    with_limiter(None, work)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[default", "not valid TOML"),
        ('[default]\nrequests = "ten"', "default.requests: Value error, 'ten' is no limit"),
        ('[default]\nrequests = "0/minute"', "at least 1"),
        ('[tenants.acme]\nrequest = "1/day"', "tenants.acme.request"),
        ("[default]\nrequests = 5", "default.requests"),
        ("other = 1", "other"),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_quotas(path)
    assert str(path) in caught.value.message


def test_missing_file_and_wrong_url_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the limits"):
        Limiter(LimitsSettings(limits_file=tmp_path / "none.toml"))
    with pytest.raises(ValidationError, match="must start with redis://"):
        LimitsSettings.model_validate({"limits_url": "memcached://host"})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0171, "18ms"),
        (0.9991, "1000ms"),
        (1.0, "1s"),
        (59.5, "1m0s"),
        (360, "6m0s"),
        (3661.2, "1h1m2s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.integers(0, 10**7), st.integers(0, 10**6))
def test_estimate_is_never_less_than_the_answer_may_have(characters: int, answer: int) -> None:
    assert estimate_tokens(characters, answer) >= answer + characters / 4
