"""The figures of :mod:`gateway.bench`: medians, ratios, the table, and where they come from."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.bench.install import LITELLM, PORTKEY, node_version
from gateway.bench.load import ONE, PACED, SIXTEEN, STREAMS, Cell, Work
from services.common import benchmarks
from services.common.benchmarks import spread

OURS = "fedward"
METRICS = ("cpu_ms", "per_second", "p50_ms", "p95_ms", "first_ms")
LIBRARIES = ("aiohttp", "fastapi", "httptools", "httpx", "starlette", "uvicorn", "uvloop")


def _of(cells: Iterable[Cell], peer: str, work: Work) -> list[Cell]:
    return sorted((c for c in cells if c.peer == peer and c.work == work.name), key=lambda cell: cell.round)


def figures(cells: Sequence[Cell], peer: str, work: Work) -> dict[str, Any]:
    """What a kind of work costs a peer; only ``failed`` where it answered none of it as it should."""
    found = _of(cells, peer, work)
    asked, failed = sum(cell.requests for cell in found), sum(cell.failed for cell in found)
    failure = next((cell.failure for cell in found if cell.failure), None)
    if failed == asked:
        return {"failed": f"none of {asked} requests was answered in full: {failure}"}
    spreads = {name: spread([getattr(cell, name) for cell in found]) for name in METRICS}
    return spreads | {"requests": asked, "failed_requests": failed, "first_failure": failure}


def guarded(cells: Sequence[Cell], peers: Sequence[str]) -> dict[str, Any]:
    """Whole answers: CPU time a request at 16 in flight, all figures by concurrency, and our ratios to each peer."""
    found: dict[str, Any] = {}
    for peer in peers:
        by_concurrency = {str(work.concurrency): figures(cells, peer, work) for work in (ONE, SIXTEEN)}
        sixteen = by_concurrency["16"]
        headline = sixteen.get("cpu_ms", {}).get("median")
        found[peer] = {"cpu_ms_per_request": headline, "concurrency": by_concurrency}
        if "failed" in sixteen:
            found[peer]["failed"] = sixteen["failed"]
    for peer in peers:
        if OURS in peers and peer != OURS and (rates := _ratios(cells, peer, SIXTEEN, "per_second")):
            found[f"rps_ratio_vs_{peer}"] = statistics.median(rates)
            found[f"rps_ratio_vs_{peer}_range"] = [min(rates), max(rates)]
            found[f"cpu_ratio_vs_{peer}"] = statistics.median(_ratios(cells, peer, SIXTEEN, "cpu_ms"))
    return found


def _ratios(cells: Sequence[Cell], peer: str, work: Work, name: str) -> list[float]:
    """Ours to theirs, round by round: neighbours in time had the same machine."""
    pairs = zip(_of(cells, OURS, work), _of(cells, peer, work), strict=True)
    return [getattr(a, name) / getattr(b, name) for a, b in pairs if a.failed < a.requests and b.failed < b.requests]


def streams(cells: Sequence[Cell], peers: Sequence[str]) -> dict[str, Any]:
    """Streams of 50 words: CPU time a stream, the words at once and 5 ms apart."""
    found: dict[str, Any] = {}
    for peer in peers:
        at_once, paced = figures(cells, peer, STREAMS), figures(cells, peer, PACED)
        found[peer] = {
            "cpu_ms_per_stream": at_once.get("cpu_ms", {}).get("median"),
            "cpu_ms_per_paced_stream": paced.get("cpu_ms", {}).get("median"),
            "at_once": at_once,
            "paced": paced,
        }
        if "failed" in at_once:
            found[peer]["failed"] = at_once["failed"]
    return found


def goals(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What our gateway is to reach, and whether it did; ``value`` is None where it was not measured."""
    ours = summary["peers"].get(OURS, {})
    rows: list[tuple[str, float | None, str, float]] = [
        ("guarded request, CPU ms", summary["guarded"].get(OURS, {}).get("cpu_ms_per_request"), "at most", 2.5),
        ("guarded requests/s : LiteLLM's", summary["guarded"].get("rps_ratio_vs_litellm"), "at least", 12.0),
        ("guarded 50-word stream, CPU ms", summary["stream"].get(OURS, {}).get("cpu_ms_per_stream"), "at most", 5.0),
        ("memory at start, MB", ours.get("start_rss_mb"), "at most", 90.0),
        ("start, seconds", ours.get("start_seconds"), "at most", 3.0),
        ("characters leaked", summary["leak"].get(OURS, {}).get("characters_leaked"), "at most", 0.0),
        ("faults in which unsafe text passed", _passed(summary["fault"].get(OURS)), "at most", 0.0),
    ]
    return [
        {
            "goal": f"{name} {bound} {limit:g}",
            "value": value,
            "met": None if value is None else _met(value, bound, limit),
        }
        for name, value, bound, limit in rows
    ]


def _met(value: float, bound: str, limit: float) -> bool:
    return value <= limit if bound == "at most" else value >= limit


def _passed(cases: dict[str, Any] | None) -> int | None:
    return None if cases is None else sum(bool(case.get("unsafe_text_passed")) for case in cases.values())


def provenance() -> dict[str, Any]:
    """Where the figures come from; nothing in them is random, so there are no seeds."""
    found = benchmarks.provenance(LIBRARIES, seeds={})
    found["versions"] |= {"litellm": LITELLM, "portkey": PORTKEY, "node": node_version()}
    return found
