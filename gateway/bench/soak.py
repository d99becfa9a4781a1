"""``python -m gateway.bench.soak``: many streams at once through our gateway for minutes; do memory and files grow?

A closed loop: every client asks for a stream, reads it to its end, waits for up to the time between two words, and asks
for the next. Clients begin spread over the length of a stream, so that the load is the same at any moment. How many
streams are open at once is measured, at the mock model and at the clients.
"""

import argparse
import asyncio
import os
import random
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from rich.console import Console

from gateway.bench.client import Answer, ask
from gateway.bench.gateways import Gateway, is_good, running_gateway
from gateway.bench.peers import launch_fedward
from gateway.bench.processes import Cores, cpu_seconds, pin, rss_mb
from gateway.bench.report import OURS, provenance
from gateway.bench.script import Script
from gateway.bench.services import MockServices, mock_services
from gateway.bench.soak_report import draw, steady, summary_line
from services.common.benchmarks import write_figures
from services.common.connections import allow_many_connections
from services.common.settings import exit_with
from services.contracts.errors import FedwardError

PROGRAM = "python -m gateway.bench.soak"
RETRY_SECONDS = 1.0, 5.0  # a client whose stream failed comes back after a time between these
SETTLE_SECONDS = 6.0  # kept connections are closed after 5 s


class Sample(NamedTuple):
    """What the gateway holds at a moment; ``seconds`` since the load began."""

    seconds: float
    rss_mb: float
    open_files: int
    tasks: int
    leaked_characters: int
    generations_open: int
    checks: int
    cpu_seconds: float


class Stream(NamedTuple):
    """One stream as its client saw it: when it was asked for, when its first text came, and when it ended."""

    asked_at: float
    first_at: float | None
    ended_at: float
    failure: str | None


def main(argv: Sequence[str]) -> int:
    """Load, sample, print a line, write the JSON and draw; returns the exit code."""
    options = read_options(argv)
    for number in (signal.SIGTERM, signal.SIGINT):  # by default the first would leave the gateway behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    allow_many_connections()
    try:
        summary = run(options) | {"command": shlex.join([*PROGRAM.split(), *argv])}
        print(summary_line(summary))
        write_figures(options.out, summary)
        draw(summary, options.out.with_suffix(".png"))
    except FedwardError as error:
        return exit_with(error)
    return 0 if not summary["failures"] else 1


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the load lasts (default: 10)")
    parser.add_argument("--streams", type=int, default=100, help="streams at once (default: 100)")
    parser.add_argument("--words", type=int, default=50, help="words of a stream (default: 50)")
    parser.add_argument("--word-ms", type=float, default=40.0, help="time between two words (default: 40)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/soak.json"), help="where the figures go")
    parser.add_argument("flags", nargs="*", help="after --, further flags of the gateway")
    options = parser.parse_args(argv)
    if min(options.minutes, options.streams, options.words, options.word_ms, options.every) <= 0:
        parser.error("--minutes, --streams, --words, --word-ms and --every are above 0")
    options.script = Script(words=options.words, word_seconds=options.word_ms / 1000)
    options.stream_seconds = options.words * options.word_ms / 1000
    if options.minutes * 60 < 3 * options.stream_seconds:
        parser.error(f"a stream takes {options.stream_seconds:g} s; --minutes has to be at least three times as long")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the gateway and the mock services, load them, and stop them."""
    console, cores = Console(stderr=True), Cores.found()
    folder = options.out.with_suffix("").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = provenance() | {"seeds": {"first_client": 0}}  # each client has its number
    with ExitStack() as exits:
        pin(os.getpid(), cores.rest)
        services = exits.enter_context(mock_services(cores.rest))
        launch = partial(launch_fedward, services, folder, folder, Path(sys.executable), options.flags)
        gateway = exits.enter_context(running_gateway(OURS, launch, services, folder, cores.gateways))
        services.follow(options.script)
        console.print(f"{options.streams} streams of {options.stream_seconds:g} s for {options.minutes:g} minutes")
        samples, streams, after = asyncio.run(soak(gateway, services, options))
    failures = Counter(stream.failure for stream in streams if stream.failure)
    # The load is even once all clients have begun, and memory settles while buffers and pools fill.
    warm_up = max(options.stream_seconds, options.minutes * 60 / 5)
    return found | {
        "settings": {
            name: getattr(options, name) for name in ("minutes", "streams", "words", "word_ms", "stream_seconds")
        },
        "streams_ended": len(streams),
        "failures": dict(failures),
        "failed_at_seconds": [round(stream.ended_at, 1) for stream in streams if stream.failure],
        "steady": steady(samples, streams, warm_up),
        "after_load": after._asdict(),
        "samples": [sample._asdict() for sample in samples],
    }


async def soak(
    gateway: Gateway, services: MockServices, options: argparse.Namespace
) -> tuple[list[Sample], list[Stream], Sample]:
    """Samples under load, all streams, and a last sample when the load is over and connections had time to close."""
    began, seconds = time.perf_counter(), options.minutes * 60
    streams: list[Stream] = []
    samples: list[Sample] = []
    patience, word_seconds = options.stream_seconds * 2 + 60, options.script.word_seconds

    async def ask_on(session: aiohttp.ClientSession, number: int) -> None:
        chance = random.Random(number)
        await asyncio.sleep(options.stream_seconds * number / options.streams)
        while (asked_at := time.perf_counter() - began) < seconds:
            answer = await ask(session, gateway.target, patience, stream=True)
            streams.append(_stream(asked_at, answer, options.script))
            # Without a wait, streams that are held up together would go on together, and more with them every time.
            await asyncio.sleep(chance.uniform(*(RETRY_SECONDS if streams[-1].failure else (0, word_seconds))))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as group:
        for number in range(options.streams):
            group.create_task(ask_on(session, number))
        while (now := time.perf_counter() - began) < seconds:
            samples.append(await _sample(now, gateway, services))
            await asyncio.sleep(options.every)
    await asyncio.sleep(SETTLE_SECONDS)
    return samples, streams, await _sample(time.perf_counter() - began, gateway, services)


def _stream(asked_at: float, answer: Answer, script: Script) -> Stream:
    first = None if answer.first_byte_seconds is None else asked_at + answer.first_byte_seconds
    failure = None if is_good(answer, script) else f"HTTP {answer.status}, {answer.end}"
    return Stream(asked_at, first, asked_at + answer.seconds, failure)


async def _sample(now: float, gateway: Gateway, services: MockServices) -> Sample:
    url = gateway.target.url.replace("/v1/chat/completions", "/metrics")
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        metrics = await response.text()
    counters = await asyncio.to_thread(services.counters)
    return Sample(
        round(now, 2),
        round(rss_mb(gateway.process), 2),
        gateway.process.num_fds(),
        _metric(metrics, "fedward_asyncio_tasks"),
        _metric(metrics, "fedward_gateway_characters_released_before_verdict_total"),
        counters.generations_open,
        counters.checks,
        cpu_seconds(gateway.process),
    )


def _metric(metrics: str, name: str) -> int:
    found = re.search(rf"^{name} (\S+)$", metrics, flags=re.MULTILINE)
    assert found, f"the gateway has no metric {name}"
    return int(float(found[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
