"""The figures of :mod:`services.safety.training.bench`: what is measured, ratios, the table."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

from services.common.benchmarks import spread

TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # what the kernel counts CPU time in; less than one cannot be told from none
SEED = 0  # of the texts and of the pipeline's head


class Way(NamedTuple):
    """One way to have texts scored: ``batch`` texts a call, ``concurrency`` calls at a time."""

    name: str
    batch: int
    concurrency: int = 1


ONE, SIXTEEN, BULK = Way("service, 1 request", 1), Way("service, 16 requests", 1, 16), Way("service, 64 items", 64)
PLAIN, BATCHED = Way("pipeline, 1 text", 1), Way("pipeline, batch 16", 16)
SERVICE, PIPELINE = (ONE, SIXTEEN, BULK), (PLAIN, BATCHED)
PAIRS = ((ONE, PLAIN), (SIXTEEN, PLAIN), (SIXTEEN, BATCHED), (BULK, BATCHED))
METRICS = ("texts_per_second", "cpu_ms_per_text", "p50_ms", "p95_ms")


@dataclass(frozen=True)
class Measurement:
    """One way on the texts of one length in one round; latencies are those of a call."""

    round: int
    tokens: int
    way: str
    texts_per_second: float
    cpu_ms_per_text: float
    p50_ms: float
    p95_ms: float


class Meter:
    """Wall and CPU seconds of a block of work in some process, and the seconds of each of its calls."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.latencies: list[float] = []

    def __enter__(self) -> "Meter":
        self._began, self._cpu_began = time.perf_counter(), self._cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu_seconds = max(self._cpu() - self._cpu_began, TICK)

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


def ratios(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Service : pipeline by length and pair of ways: over the rounds, the median and the range.

    More texts/s, less CPU time and less latency are in the service's favour. Latencies are compared only where a call
    has as many texts on both sides.
    """
    by_cell = {(one.round, one.tokens, one.way): one for one in measured}
    rounds = sorted({one.round for one in measured})
    found = []
    for tokens in sorted({one.tokens for one in measured}):
        for ours, theirs in PAIRS:
            pairs = [(by_cell[n, tokens, ours.name], by_cell[n, tokens, theirs.name]) for n in rounds]
            names = METRICS if ours.batch == theirs.batch else METRICS[:2]
            spreads = {name: spread([getattr(a, name) / getattr(b, name) for a, b in pairs]) for name in names}
            found.append({"tokens": tokens, "service": ours.name, "pipeline": theirs.name} | spreads)
    return found


def table(summary: dict[str, Any]) -> str:
    """The figures of every way, medians over the rounds, then the ratios, then start and memory; in Markdown."""
    lines = ["| tokens | way | texts/s | CPU-ms/text | p50 ms | p95 ms |", "|---|---|---|---|---|---|"]
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in summary["measurements"]:
        cells.setdefault((one["tokens"], one["way"]), []).append(one)
    for (tokens, way), rounds in sorted(cells.items(), key=lambda cell: cell[0][0]):
        medians = [statistics.median(one[name] for one in rounds) for name in METRICS]
        lines.append(f"| {tokens} | {way} | " + " | ".join(f"{value:.1f}" for value in medians) + " |")
    lines += [
        "",
        "| tokens | service : pipeline | texts/s | CPU-ms/text | p50 ms | p95 ms |",
        "|---|---|---|---|---|---|",
    ]
    for one in summary["ratios"]:
        shown = " | ".join(_shown(one.get(name)) for name in METRICS)
        lines.append(f"| {one['tokens']} | {one['service']} : {one['pipeline']} | {shown} |")
    service, pipeline = summary["service"], summary["pipeline"]
    lines += ["", f"service: ready in {service['ready_seconds']:.1f} s, {service['rss_mb']:.0f} MB after load; "
              f"this process with the pipeline: {pipeline['rss_mb']:.0f} MB"]  # fmt: skip
    return "\n".join(lines)


def _shown(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.2f}x ({spread['low']:.2f} to {spread['high']:.2f})" if spread else "-"
