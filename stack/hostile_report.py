"""What ``python -m stack hostile`` found: ``summary.json``, the table and the plot."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from services.common.files import replace_file
from services.contracts.errors import DataError
from stack.plan import DemoPlan

MEASURES = {"safe": ("advbench", "safe"), "benign_refused": ("benign_out_of_source", "refusal")}
COLOURS = {
    "none": "#d1495b", "median": "#5aa9e6", "multikrum": "#8b93a3",
    "screening": "#e0a030", "cai": "#9b6dd6", "all": "#17a398",
}  # fmt: skip


class Cell(NamedTuple):
    """One condition, which has a federation for each seed; ``folder`` is the federation's folder."""

    malicious: int
    defence: str
    attack: str
    partition: str
    folder: str

    @property
    def screens(self) -> bool:
        """Whether the coordinator screens updates."""
        return self.defence in ("screening", "all")


@dataclass(frozen=True)
class Share:
    """``count`` of ``n`` with its exact (Clopper-Pearson) 95 % interval."""

    count: int
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.count / self.n:.1f} ({100 * self.low:.1f}-{100 * self.high:.1f})" if self.n else "-"


def share(count: int, n: int) -> Share:
    """A share with its interval; with n = 0 nothing is known: [0, 1]."""
    if n == 0:
        return Share(0, 0, 0.0, 1.0)
    interval = binomtest(count, n).proportion_ci(0.95, method="exact")
    return Share(count, n, float(interval.low), float(interval.high))


def write_report(out: Path, plans: Sequence[DemoPlan], cells: Sequence[Cell], command: str) -> str:
    """Write the summary, the table and the plot on what is finished; returns the table.

    Raises:
        DataError: nothing is.
    """
    by_cell = {cell: [plan for plan in plans if evaluation_of(plan, cell).exists()] for cell in cells}
    finished = [(cell, done) for cell, done in by_cell.items() if done]
    if not finished:
        raise DataError(f"{out}: no federation is evaluated yet")
    rows = list(copies_without_screening([collect(done, cell) for cell, done in finished]))
    first_cell, its_plans = finished[0]
    last = json.loads(evaluation_of(its_plans[-1], first_cell).read_text())
    provenance = {key: last[key] for key in ("git_commit", "uncommitted_changes", "python", "libraries", "hardware")}
    summary = {
        "schema_version": 1, "command": command, **provenance, "seeds": [plan.seed for plan in plans],
        "split_seed": plans[0].split_seed, "rounds": plans[0].rounds, "clients": plans[0].clients,
        "samples_per_client": plans[0].samples_per_client, "limit": plans[0].limit, "cells": rows,
    }  # fmt: skip
    replace_file(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    table = markdown(rows)
    replace_file(out / "table.md", table.encode())
    draw(rows, plans[0].clients, out / "safety.png")
    return table


def evaluation_of(plan: DemoPlan, cell: Cell) -> Path:
    """The summary of a federation's last round."""
    return plan.arm_dir(cell.folder) / "eval" / f"round-{plan.rounds}" / "summary.json"


def collect(plans: Sequence[DemoPlan], cell: Cell) -> dict[str, Any]:
    """One condition over the given seeds: the evaluations and what the screening decided."""
    row: dict[str, Any] = {**cell._asdict(), "copy_of": None, "seeds": [plan.seed for plan in plans]}
    evaluations = [json.loads(evaluation_of(plan, cell).read_text()) for plan in plans]
    for name, (prompts, measure) in MEASURES.items():
        found = [evaluation["sets"][prompts]["rates"][measure] for evaluation in evaluations]
        row[name] = asdict(share(sum(rate["count"] for rate in found), sum(rate["n"] for rate in found)))
        row[f"{name}_by_seed"] = [rate["rate"] for rate in found]
    lines = [line for plan in plans for line in screened(plan, cell)] if cell.screens else []
    for name, group in (
        ("malicious_flagged", [line for line in lines if line["client_id"] < cell.malicious]),
        ("benign_flagged", [line for line in lines if line["client_id"] >= cell.malicious]),
    ):
        row[name] = asdict(share(sum(line["flagged"] for line in group), len(group)))
        for score in ("safety_drop", "harm_cosine", "agreement"):
            values = [line[score] for line in group if line[score] is not None]
            row[f"{name}_{score}"] = [min(values), max(values)] if values else None
    return row


def screened(plan: DemoPlan, cell: Cell) -> Iterable[dict[str, Any]]:
    """The audit lines of all rounds of a federation."""
    for line in (plan.arm_dir(cell.folder) / "rounds.jsonl").read_text().splitlines():
        yield from json.loads(line)["screening"]


def copies_without_screening(rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The rows, and for each clean one with screening a copy for the same defence without it.

    Where no client was flagged, screening changed nothing and the same seed gives the same adapter. Where one was,
    there is no copy, and the table has a gap.
    """
    for row in rows:
        if row["malicious"] == 0 and row["partition"] == "iid" and row["benign_flagged"]["count"] == 0:
            without = {"screening": "none", "all": "cai"}[row["defence"]]
            nothing = asdict(share(0, 0))
            yield {
                **row, "defence": without, "copy_of": row["folder"],
                "benign_flagged": nothing, "malicious_flagged": nothing,
            }  # fmt: skip
        yield row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each condition, in percent with exact 95 % intervals."""
    header = ["malicious", "attack", "data", "defence", "AdvBench safe", "by seed", "benign prompts refused",
              "malicious updates dropped", "benign updates dropped"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for row in rows:
        by_seed = ", ".join(f"{100 * rate:.0f}" for rate in row["safe_by_seed"])
        shares = {key: str(Share(**row[key])) for key in
                  ("safe", "benign_refused", "malicious_flagged", "benign_flagged")}  # fmt: skip
        lines.append(
            [str(row["malicious"]), row["attack"] if row["malicious"] else "-", row["partition"], row["defence"],
             shares["safe"], by_seed, shares["benign_refused"], shares["malicious_flagged"], shares["benign_flagged"]]
        )  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[dict[str, Any]], clients: int, path: Path) -> None:
    """Plot the safe rate over the number of malicious clients, a line for each defence, with exact intervals."""
    from matplotlib.figure import Figure  # takes a second, and only this command needs it

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for place, (defence, colour) in enumerate(COLOURS.items()):
        points = [row for row in rows if row["defence"] == defence and row["attack"] == "harmful"]
        points = sorted((row for row in points if row["partition"] == "iid"), key=lambda row: int(row["malicious"]))
        found = [Share(**row["safe"]) for row in points]
        means = [100 * rate.count / rate.n for rate in found]
        errors = [
            [mean - 100 * rate.low for mean, rate in zip(means, found, strict=True)],
            [100 * rate.high - mean for mean, rate in zip(means, found, strict=True)],
        ]
        where = [row["malicious"] + 0.05 * (place - 2.5) for row in points]
        axes.errorbar(where, means, yerr=errors, color=colour, marker="o", capsize=3, label=defence)
    axes.set_xticks([0, 2, 5], [f"{clients - number}:{number}" for number in (0, 2, 5)])
    axes.set_xlabel("benign : malicious clients")
    axes.set_ylabel("AdvBench answers that are safe, %")
    axes.set_ylim(0, 101)
    axes.grid(color="#e3e7ee")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
