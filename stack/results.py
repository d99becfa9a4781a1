"""The demo's federations over several training seeds and splits, and the table of ``docs/results.md``.

Each combination is a demo of its own, up to its report, in a process of its own. A finished one is not run again, so
an interrupted ``make results`` goes on where it was.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

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
    out: Path, seeds: Sequence[int], split_seeds: Sequence[int], flags: Sequence[str], console: Console
) -> None:
    """Run every combination of seeds that is not done yet, then print the table and write ``results.md``.

    Args:
        out: the folder with one demo each, ``seed-S-split-T``.
        seeds: training seeds.
        split_seeds: seeds of AdvBench's split.
        flags: further flags of ``python -m stack demo``.
        console: where progress and the table go.

    Raises:
        ProcessFailed: one of the demos failed.
    """
    folders = []
    with Processes(out / "logs") as processes:
        for seed in seeds:
            for split_seed in split_seeds:
                folder = out / f"seed-{seed}-split-{split_seed}"
                folders.append(folder)
                if (folder / "summary.json").exists():
                    console.print(f"[green]✓[/] {folder.name} is there")
                    continue
                with console.status(f"{folder.name} ({len(folders)} of {len(seeds) * len(split_seeds)})"):
                    command = [
                        "demo",
                        "--out",
                        str(folder),
                        "--seed",
                        str(seed),
                        "--split-seed",
                        str(split_seed),
                        "--no-release",
                    ]
                    processes.run(folder.name, [sys.executable, "-m", "stack", *command, *flags])
                console.print(f"[green]✓[/] {folder.name}")
    table = markdown_table([json.loads((folder / "summary.json").read_text()) for folder in folders])
    (out / "results.md").write_text(table, encoding="utf-8")
    console.print(table, markup=False)


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
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(shares: Sequence[float]) -> Spread:
    """Mean, sample standard deviation (0 for one run) and range of shares, in percent."""
    percent = [100 * share for share in shares]
    deviation = statistics.stdev(percent) if len(percent) > 1 else 0.0
    return Spread(statistics.mean(percent), deviation, min(percent), max(percent), len(percent))
