"""The figures of :mod:`services.inference.bench`: what is measured, ratios, the table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.common.benchmarks import spread

LEVELS = (1, 4, 8, 16)  # requests at a time
GOAL_LEVEL, GOAL = 8, 3.0


@dataclass(frozen=True)
class Measurement:
    """All prompts answered once; ``concurrency`` 0 stands for ``generate`` in a loop, without the service."""

    round: int
    concurrency: int
    tokens: int
    seconds: float
    tokens_per_second: float


def ratios(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Tokens/s of the service : generate at each level: over the rounds, the median and the range."""
    speed = {(one.round, one.concurrency): one.tokens_per_second for one in measured}
    rounds = sorted({one.round for one in measured})
    found = []
    for level in LEVELS:
        values = [speed[number, level] / speed[number, 0] for number in rounds]
        found.append({"concurrency": level, "tokens_per_second": spread(values)})
    return found


def table(summary: dict[str, Any]) -> str:
    """Medians over the rounds and ratios, in Markdown."""
    speeds: dict[int, list[float]] = {}
    for one in summary["measurements"]:
        speeds.setdefault(one["concurrency"], []).append(one["tokens_per_second"])
    lines = ["| way | tokens/s | service : generate |", "|---|---|---|"]
    lines.append(f"| generate, one at a time | {statistics.median(speeds[0]):.0f} | 1 |")
    for one in summary["ratios"]:
        level, spread = one["concurrency"], one["tokens_per_second"]
        shown = f"{spread['median']:.2f}x ({spread['low']:.2f} to {spread['high']:.2f})"
        lines.append(f"| service, {level} at a time | {statistics.median(speeds[level]):.0f} | {shown} |")
    reached = next(one["tokens_per_second"]["median"] for one in summary["ratios"] if one["concurrency"] == GOAL_LEVEL)
    goal = f"goal at {GOAL_LEVEL}: at least {GOAL:g}x, {'reached' if reached >= GOAL else 'missed'}"
    lines += ["", f"{goal}; {summary['same_answers']:.1%} of the answers are the same to the letter"]
    return "\n".join(lines)
