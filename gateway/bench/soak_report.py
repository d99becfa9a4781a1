"""The figures of :mod:`gateway.bench.soak`: how memory goes with time, how many streams were open, and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from gateway.bench.processes import PeerFailed

if TYPE_CHECKING:
    from gateway.bench.soak import Sample, Stream

BLOCKS = 16  # neighbouring samples are alike, so the line is fitted to the means of so many stretches of time
FEWEST_SAMPLES = 3


def steady(samples: Sequence["Sample"], streams: Sequence["Stream"], warm_up: float) -> dict[str, Any]:
    """What holds after the warm-up: memory and its growth, files, tasks, streams at once, and their times.

    Raises:
        PeerFailed: the gateway was too busy to be asked for its metrics.
    """
    kept = [sample for sample in samples if sample.seconds >= warm_up]
    if len(kept) < FEWEST_SAMPLES:
        raise PeerFailed(f"the gateway answered {len(kept)} times when asked for its metrics; lower the load")
    first, last = kept[0], kept[-1]
    minutes = (last.seconds - first.seconds) / 60
    ended = [stream for stream in streams if first.seconds <= stream.ended_at <= last.seconds]
    waits = [stream.first_at - stream.asked_at for stream in ended if stream.first_at is not None]
    lengths = [stream.ended_at - stream.asked_at for stream in ended]
    return {
        "from_seconds": first.seconds,
        "to_seconds": last.seconds,
        "samples": len(kept),
        "rss_mb": _range([sample.rss_mb for sample in kept]),
        "rss_growth": growth([sample.seconds for sample in kept], [sample.rss_mb for sample in kept]),
        "open_files": _range([sample.open_files for sample in kept]),
        "tasks": _range([sample.tasks for sample in kept]),
        "open_at_model": _range([sample.generations_open for sample in kept]),
        "open_at_clients": _range([open_at(streams, sample.seconds) for sample in kept]),
        "leaked_characters": last.leaked_characters,
        "cpu_share": round((last.cpu_seconds - first.cpu_seconds) / (last.seconds - first.seconds), 3),
        "checks_per_second": round((last.checks - first.checks) / (last.seconds - first.seconds), 1),
        "streams_per_minute": round(len(ended) / minutes, 1),
        "first_text_seconds": _percentiles(waits),
        "stream_seconds": _percentiles(lengths),
    }


def growth(seconds: Sequence[float], megabytes: Sequence[float]) -> dict[str, Any]:
    """The slope of memory over time by least squares, with its 95 % interval (Student's t, ``n`` - 2 degrees)."""
    blocks = [block for block in np.array_split(np.arange(len(seconds)), BLOCKS) if len(block)]
    hours = [float(np.mean([seconds[i] for i in block])) / 3600 for block in blocks]
    means = [float(np.mean([megabytes[i] for i in block])) for block in blocks]
    fit = stats.linregress(hours, means)
    half = float(stats.t.ppf(0.975, len(blocks) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    interval = [round(slope - half, 2), round(slope + half, 2)]
    return {"mb_per_hour": round(slope, 2), "interval": interval, "n": len(blocks)}


def open_at(streams: Sequence["Stream"], moment: float) -> int:
    """How many clients had got text of a stream and not yet its end."""
    return sum(stream.first_at is not None and stream.first_at <= moment < stream.ended_at for stream in streams)


def summary_line(summary: Mapping[str, Any]) -> str:
    """The result for people."""
    found, fit = summary["steady"], summary["steady"]["rss_growth"]
    failures = ", ".join(f"{count} x {reason}" for reason, count in summary["failures"].items()) or "none"
    return (
        f"{summary['streams_ended']} streams, failures: {failures}; open at once {found['open_at_model']['low']} to "
        f"{found['open_at_model']['high']} at the model, {found['open_at_clients']['low']} to "
        f"{found['open_at_clients']['high']} at the clients; memory {found['rss_mb']['median']} MB, "
        f"{fit['mb_per_hour']:+} MB/h (95 % {fit['interval'][0]:+} to {fit['interval'][1]:+}, n={fit['n']}); "
        f"files {found['open_files']['high']}, after the load {summary['after_load']['open_files']}"
    )


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Memory and open files over time, as a picture."""
    from matplotlib.figure import Figure

    samples = summary["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    memory = figure.subplots()
    memory.plot(minutes, [sample["rss_mb"] for sample in samples], color="tab:blue")
    memory.axvspan(0, summary["steady"]["from_seconds"] / 60, color="0.93")
    memory.set(xlabel="minutes (grey: warm-up)", ylabel="resident memory, MB", ylim=(0, None), xlim=(0, None))
    files = memory.twinx()
    files.plot(minutes, [sample["open_files"] for sample in samples], color="tab:orange", linewidth=0.8)
    files.set(ylabel="open files (orange)", ylim=(0, None))
    settings = summary["settings"]
    memory.set_title(f"{settings['streams']} streams at once for {settings['minutes']:g} minutes")
    figure.savefig(path, dpi=120)


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"low": min(values), "median": float(np.median(values)), "high": max(values)}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "p99": round(float(p99), 3), "n": len(values)}
