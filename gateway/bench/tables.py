"""The figures as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.bench.report import OURS


def tables(summary: Mapping[str, Any]) -> str:
    """Cost, leaks, faults and goals."""
    return "\n\n".join([_cost(summary), _leaks(summary), _faults(summary), _goals(summary)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _cost(summary: Mapping[str, Any]) -> str:
    head = ["peer", "CPU ms/request, c=1", "c=16", "requests/s, c=16", "p50 ms", "p95 ms"]
    head += ["CPU ms/stream", "paced", "MB at start", "MB after", "start s"]
    rows = []
    for name, peer in summary["peers"].items():
        if "failed" in peer:
            rows.append([name, f"failed: {peer['failed']}", *["-"] * (len(head) - 2)])
            continue
        one, sixteen = (summary["guarded"][name]["concurrency"][key] for key in ("1", "16"))
        stream = summary["stream"][name]
        medians = [one.get("cpu_ms"), *(sixteen.get(key) for key in ("cpu_ms", "per_second", "p50_ms", "p95_ms"))]
        shown = [_number(value and value["median"]) for value in medians]
        shown += ["fails" if "failed" in stream else _number(stream["cpu_ms_per_stream"])]
        shown += [_number(stream["cpu_ms_per_paced_stream"])]
        shown += [_number(peer["start_rss_mb"], ".0f"), _number(peer["rss_mb"], ".0f")]
        rows.append([name, *shown, _number(peer["start_seconds"])])
    return _table(head, rows)


def _leaks(summary: Mapping[str, Any]) -> str:
    peers = list(summary["leak"])
    modes = list(summary["leak"][peers[0]]["modes"]) if peers else []
    rows = [[mode, *(_leak(summary["leak"][peer]["modes"][mode]) for peer in peers)] for mode in modes]
    for peer in peers:
        for name, found in summary["leak"][peer]["other_settings"].items():
            rows.append([f"stream, {name}", *(_leak(found) if other == peer else "-" for other in peers)])
    return _table(["characters leaked", *peers], rows)


def _leak(found: Mapping[str, Any]) -> str:
    return f"{found['characters_leaked']} ({found['status']}, {found['end']})"


def _faults(summary: Mapping[str, Any]) -> str:
    peers = list(summary["fault"])
    cases = list(summary["fault"][peers[0]]) if peers else []
    rows = [[case, *(_fault(summary["fault"][peer][case]) for peer in peers)] for case in cases]
    return _table(["fault", *peers], rows)


def _fault(found: Mapping[str, Any]) -> str:
    if "generation_cancelled" in found:
        return f"{'cancelled' if found['generation_cancelled'] else 'NOT CANCELLED'} after {found['seconds']:.1f} s"
    passed = "UNSAFE TEXT PASSED, " if found["unsafe_text_passed"] else ""
    status = "no answer" if found["status"] is None else f"HTTP {found['status']}"
    end = "" if found["end"] == "complete" else f", {found['end']}"
    lost = "" if found["recovered_seconds"] is not None else ", does not recover"
    return f"{passed}{status}{end}, {found['seconds']:.1f} s{lost}"


def _goals(summary: Mapping[str, Any]) -> str:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [[row["goal"], _number(row["value"], ".2f"), words[row["met"]]] for row in summary["goals"]]
    return _table([f"goal of {OURS}", "value", ""], rows)
