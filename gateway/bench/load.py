"""Closed-loop load on one gateway, and what it cost that gateway's processes."""

import asyncio
import time
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import aiohttp
import numpy as np

from gateway.bench.client import ask
from gateway.bench.gateways import Gateway, is_good
from gateway.bench.processes import TICK, cpu_seconds
from gateway.bench.script import Script

PATIENCE = 60.0
SETTLE_SECONDS = 0.5  # for what a gateway does only after it has answered, such as its logs


@dataclass(frozen=True)
class Work:
    """Requests of one kind: whole or streamed, ``concurrency`` at a time, on what the script says."""

    name: str
    concurrency: int
    stream: bool
    script: Script


ONE = Work("whole, c=1", 1, False, Script())
SIXTEEN = Work("whole, c=16", 16, False, Script())
STREAMS = Work("stream, c=8", 8, True, Script())
PACED = Work("stream of 5 ms a word, c=8", 8, True, Script(word_seconds=0.005))
WORKS = (ONE, SIXTEEN, STREAMS, PACED)


@dataclass(frozen=True)
class Cell:
    """One kind of work on one gateway in one round. Only good answers count; ``failed`` is how many were not.

    ``first_ms`` is the median time to the first byte of the body.
    """

    round: int
    work: str
    peer: str
    requests: int
    failed: int
    failure: str | None
    cpu_ms: float
    per_second: float
    p50_ms: float
    p95_ms: float
    first_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return asdict(self)


async def measure(gateway: Gateway, work: Work, number: int, requests: int, seconds: float) -> Cell:
    """Ask until there were so many requests or seconds, whichever comes first; a warm-up goes before."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        warm = [ask(session, gateway.target, PATIENCE, stream=work.stream) for _ in range(work.concurrency)]
        await asyncio.gather(*warm)
        await asyncio.sleep(SETTLE_SECONDS)
        answers, numbers = [], count()
        began, cpu_began = time.perf_counter(), cpu_seconds(gateway.process)

        async def ask_on() -> None:
            while next(numbers) < requests and time.perf_counter() - began < seconds:
                answers.append(await ask(session, gateway.target, PATIENCE, stream=work.stream))

        await asyncio.gather(*(ask_on() for _ in range(work.concurrency)))
        wall = time.perf_counter() - began
        await asyncio.sleep(SETTLE_SECONDS)
        cpu = max(cpu_seconds(gateway.process) - cpu_began, TICK)
    good = [answer for answer in answers if is_good(answer, work.script)]
    bad = next((answer for answer in answers if not is_good(answer, work.script)), None)
    timed = good or answers
    p50, p95 = (float(value) * 1e3 for value in np.percentile([answer.seconds for answer in timed], [50, 95]))
    first = float(np.median([answer.first_byte_seconds or answer.seconds for answer in timed])) * 1e3
    failure = None if bad is None else f"HTTP {bad.status}, {bad.end}"
    return Cell(
        number,
        work.name,
        gateway.name,
        len(answers),
        len(answers) - len(good),
        failure,
        cpu / len(answers) * 1e3,
        len(good) / wall,
        p50,
        p95,
        first,
    )
