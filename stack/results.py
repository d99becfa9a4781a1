"""The demo's federations over several training seeds and splits, and the tables of ``docs/results.md``.

Each combination is a demo of its own, up to its report, in a process of its own. A finished one is not run again, so
an interrupted ``make results`` goes on where it was.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from stack.plan import DemoPlan
from stack.processes import Processes

MEASURES = (
    ("AdvBench safe", "advbench", "safe_rate"),
    ("refused, out-of-source benign", "benign_out_of_source", "refusal_rate"),
    ("refused, alarming benign", "benign_alarming", "refusal_rate"),
    ("helpful", "helpfulness", "rate"),
)


class Spread(NamedTuple):
    """A figure over several runs, in percent."""

    mean: float
    deviation: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f} [{self.low:.1f}, {self.high:.1f}]"


def run_all(
    out: Path,
    size: DemoPlan,
    seeds: Sequence[int],
    split_seeds: Sequence[int],
    flags: Sequence[str],
    console: Console,
) -> None:
    """Run every combination of seeds that is not done yet, then print both tables and write ``results.md``.

    Args:
        out: the folder with one demo each, ``seed-S-split-T``.
        size: the plan that all demos share but for folder and seeds.
        seeds: training seeds.
        split_seeds: seeds of AdvBench's split.
        flags: the flags of ``python -m stack demo`` that make ``size``.
        console: where progress and the tables go.

    Raises:
        ConfigError: a folder holds a demo of another size.
        ProcessFailed: one of the demos failed.
    """
    plans = [
        replace(size, out=out / f"seed-{seed}-split-{split}", seed=seed, split_seed=split, release=False)
        for seed, split in itertools.product(seeds, split_seeds)
    ]
    finished = [plan.is_finished() for plan in plans]  # all of them at first: a wrong folder is found at once
    with Processes(out / "logs") as processes:
        for number, (plan, done) in enumerate(zip(plans, finished, strict=True), start=1):
            if not done:
                with console.status(f"{plan.out.name} ({number} of {len(plans)})"):
                    processes.run(plan.out.name, demo_command(plan, flags))
            console.print(f"[green]✓[/] {plan.out.name}")
    summaries = [json.loads((plan.out / "summary.json").read_text()) for plan in plans]
    seed_pairs = [(plan.seed, plan.split_seed) for plan in plans]
    tables = f"{markdown_table(summaries)}\n{per_run_table(seed_pairs, summaries)}"
    (out / "results.md").write_text(tables, encoding="utf-8")
    console.print(tables, markup=False, highlight=False, soft_wrap=True)


def demo_command(plan: DemoPlan, flags: Sequence[str]) -> list[str]:
    """The command that runs a plan, up to its report; ``flags`` are those that do not differ between the demos."""
    own = ["--out", str(plan.out), "--seed", str(plan.seed), "--split-seed", str(plan.split_seed), "--no-release"]
    return [sys.executable, "-m", "stack", "demo", *flags, *own]


def markdown_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One row per arm: mean, standard deviation and range over the runs of each measure, in percent."""
    header = ["arm", *(title for title, _, _ in MEASURES), "degenerate", "seconds", "MB sent"]
    rows = [header, ["---"] * len(header)]
    for arm in summaries[0]["arms"]:
        arms = [summary["arms"][arm] for summary in summaries]
        cells = [str(spread([a[part][key] for a in arms])) for _, part, key in MEASURES]
        cells.append(str(spread([a["degenerate_rate"] for a in arms])))
        cells.append(f"{statistics.mean(a['seconds'] for a in arms):.0f}")
        cells.append(f"{statistics.mean(a['bytes_sent'] for a in arms) / 1e6:.1f}")
        rows.append([f"`{arm}`", *cells])
    return _markdown(rows)


def per_run_table(seed_pairs: Sequence[tuple[int, int]], summaries: Sequence[dict[str, Any]]) -> str:
    """One row per run: training seed, split seed, then each arm's measure in percent, measure by measure."""
    columns = [(title, part, key, arm) for title, part, key in MEASURES for arm in summaries[0]["arms"]]
    header = ["training seed", "split seed", *(f"{arm}: {title}" for title, _, _, arm in columns)]
    rows = [header, ["---"] * len(header)]
    for (seed, split_seed), summary in zip(seed_pairs, summaries, strict=True):
        figures = [f"{100 * summary['arms'][arm][part][key]:.1f}" for _, part, key, arm in columns]
        rows.append([str(seed), str(split_seed), *figures])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(shares: Sequence[float]) -> Spread:
    """Mean, sample standard deviation (0 for one run) and range of shares, in percent."""
    percent = [100 * share for share in shares]
    deviation = statistics.stdev(percent) if len(percent) > 1 else 0.0
    return Spread(statistics.mean(percent), deviation, min(percent), max(percent), len(percent))
