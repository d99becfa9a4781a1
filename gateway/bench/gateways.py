"""Running peers: started, waited for, asked."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from gateway.bench.client import Answer, Target, ask
from gateway.bench.peers import Launch
from gateway.bench.processes import PeerFailed, cpu_seconds, rss_mb, running
from gateway.bench.script import Script
from gateway.bench.services import MockServices

READY_SECONDS = 180.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Gateway:
    """A peer that answers: its process, how long that took to start, and where it is asked."""

    name: str
    process: psutil.Process
    target: Target
    variants: Mapping[str, Target]
    start_seconds: float
    start_cpu_seconds: float
    start_rss_mb: float


@contextmanager
def running_gateway(
    name: str, launch: Callable[[], Launch], services: MockServices, folder: Path, core: int | None
) -> Iterator[Gateway]:
    """A peer from its start to its first whole guarded answer, and until the block ends.

    Raises:
        PeerFailed: it cannot be started, ends, or does not answer in time; the message has the end of its log.
    """
    what, log = launch(), folder / f"{name}.log"
    url = f"http://127.0.0.1:{what.port}/v1/chat/completions"
    headers = {"content-type": "application/json", **what.headers}
    target = Target(url, headers, what.fields)
    variants = {key: Target(url, headers, {**what.fields, **fields}) for key, fields in what.variants.items()}
    services.follow(Script())
    began = time.perf_counter()
    with running(what.command, what.environment, folder, log, core) as process:
        asyncio.run(_first_answer(name, target, process, log))
        seconds = time.perf_counter() - began
        yield Gateway(name, process, target, variants, seconds, cpu_seconds(process), rss_mb(process))


async def _first_answer(name: str, target: Target, process: psutil.Process, log: Path) -> None:
    script, deadline, answer = Script(), time.monotonic() + READY_SECONDS, None
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            answer = await ask(session, target, 30.0)
            if is_good(answer, script):
                return
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise PeerFailed(f"{name} ended at its start: {_last_line(log)}")
            await asyncio.sleep(POLL_SECONDS)
    shown = "nothing" if answer is None or answer.status is None else f"HTTP {answer.status}"
    raise PeerFailed(f"{name} gave no answer within {READY_SECONDS:.0f} s but {shown}: {_last_line(log)}")


def is_good(answer: Answer, script: Script) -> bool:
    """Whether a request was answered with all of the mock model's text."""
    return answer.status == 200 and answer.end == "complete" and answer.text.strip() == script.text().strip()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


def describe(answer: Answer) -> dict[str, Any]:
    """The plain facts of an answer."""
    first = answer.first_byte_seconds
    return {
        "status": answer.status,
        "end": answer.end,
        "seconds": round(answer.seconds, 3),
        "first_byte_seconds": None if first is None else round(first, 3),
    }
