"""Tasks that end with what they serve."""

import asyncio

import pytest

from gateway.tasks import beside, together


async def value(result: int, ended: list[str]) -> int:
    try:
        await asyncio.sleep(0 if result >= 0 else 60)
    finally:
        ended.append(f"{result}")
    return result


async def failure() -> int:
    await asyncio.sleep(0)
    raise ValueError("no")


def test_results_come_in_order() -> None:
    assert asyncio.run(together(value(n, []) for n in (3, 1, 2))) == [3, 1, 2]
    assert asyncio.run(together([])) == []


def test_first_error_ends_the_rest_before_it_is_raised() -> None:
    ended: list[str] = []
    with pytest.raises(ValueError, match="no"):
        asyncio.run(together([value(-1, ended), failure(), value(-2, ended)]))
    assert ended == ["-1", "-2"]


def test_leaving_the_block_ends_what_runs_beside_it() -> None:
    ended: list[str] = []

    async def run() -> None:
        async with beside(value(-1, ended)):
            await asyncio.sleep(0)
        assert ended == ["-1"]

    asyncio.run(run())


def test_failure_beside_the_block_is_nobodys_when_the_block_fails_too() -> None:
    async def run() -> None:
        async with beside(failure()):
            await asyncio.sleep(0.01)
            raise KeyError("block")

    with pytest.raises(KeyError, match="block"):
        asyncio.run(run())
