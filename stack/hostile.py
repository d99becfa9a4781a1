"""The experiment with hostile clients: ``make hostile``.

Ten clients, some of which train on harmful pairs only, with and without the coordinator's defences, over several
seeds; then two attacks that know of the screening, and harmless clients whose data differ a lot. Each federation runs
in one process (``trainer.in_process``), one after the other, and each last adapter is evaluated as in the demo.
A finished federation or evaluation is not done again, so an interrupted experiment goes on where it was.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from services.common.ports import free_port
from stack.arms import evaluate, finished_rounds, write_run_config
from stack.data import prepare_data
from stack.demo import open_folder, say_which_prompts
from stack.hostile_report import Cell, write_report
from stack.plan import DemoData, DemoPlan
from stack.processes import Processes, Service
from stack.progress import Stages
from stack.up import service_plan

DEFENCES: dict[str, dict[str, str | int | float]] = {
    "none": {"arm": "none", "screening": "off"},
    "median": {"arm": "none", "screening": "off", "strategy": "median"},
    "multikrum": {"arm": "none", "screening": "off", "strategy": "multikrum"},
    "screening": {"arm": "none", "screening": "drop"},
    "cai": {"arm": "cai", "screening": "off"},
    "all": {"arm": "cai", "screening": "drop"},
}
# Small batches: it is the number of steps that moves an adapter, and these take a third of the demo's time.
SIZES: dict[str, str | int | float] = {"batch-size": 8, "cai-steps": 15, "cai-prompts": 32}
BOOST = 5.0
# The most hostile clients among ten that a robust rule has a guarantee for.
WITHSTANDS = {"median": 4, "multikrum": 3}


@dataclass(frozen=True)
class Federation:
    """One federation of the experiment: how many clients are malicious, what they do, and what is done about it."""

    malicious: int
    defence: str
    attack: str = "harmful"  # or "boosted", "mixed"
    partition: str = "iid"

    @property
    def name(self) -> str:
        """Its folder's name."""
        parts = [self.attack if self.malicious else "clean", str(self.malicious), self.partition, self.defence]
        return "-".join(parts)


# Without malicious clients and without false alarms, screening changes nothing, bit for bit: `none` is then a copy.
FEDERATIONS = (
    *(Federation(0, defence) for defence in ("screening", "all")),
    *(Federation(malicious, defence) for malicious in (2, 5) for defence in DEFENCES),
    *(Federation(2, defence, attack) for attack in ("boosted", "mixed") for defence in ("none", "screening")),
    Federation(0, "screening", partition="dirichlet"),
)


class Batch(NamedTuple):
    """Federations that one process runs, with its flags."""

    federations: list[Federation]
    flags: list[str]


BATCHES = (
    Batch([f for f in FEDERATIONS if f.defence not in ("cai", "all") and f.attack != "boosted"], []),
    Batch([f for f in FEDERATIONS if f.attack == "boosted"], ["--boost", f"0={BOOST:g}", f"1={BOOST:g}"]),
    Batch([f for f in FEDERATIONS if f.defence in ("cai", "all")], []),  # the slow ones come last
)


def run_hostile(out: Path, size: DemoPlan, seeds: Sequence[int], console: Console, command: str) -> None:
    """Run the experiment and write its report.

    Args:
        out: the folder, with a folder ``seed-S`` for each seed.
        size: the plan that all seeds share but for folder and seed.
        seeds: training seeds.
        console: where progress and the table go.
        command: what the user typed, for the provenance.

    Raises:
        ConfigError: a folder holds an experiment of another size.
        ProcessFailed: a federation or an evaluation failed.
    """
    plans = plan_seeds(out, size, seeds)
    for plan in plans:
        open_folder(plan)
    say_which_prompts(size, console)
    services = service_plan(free_port(), free_port(), free_port())
    with Processes(out / "logs") as processes, Stages(console, len(plans) * 2 * len(FEDERATIONS)) as stages:
        stages.begin("services: safety, critique, inference")
        processes.start_services(services)
        stages.begin("data")
        prepared = [(plan, prepare_data(plan, processes)) for plan in plans]
        for batch in BATCHES:
            for plan, data in prepared:
                stages.begin(f"seed {plan.seed}: {len(batch.federations)} federations")
                run_batch(batch, plan, data, processes, services, stages)
    report(out, plans, console, command)


def plan_seeds(out: Path, size: DemoPlan, seeds: Sequence[int]) -> list[DemoPlan]:
    """The plan of each seed."""
    names = tuple(federation.name for federation in FEDERATIONS)
    return [replace(size, out=out / f"seed-{seed}", seed=seed, arms=names, release=False) for seed in seeds]


def report(out: Path, plans: Sequence[DemoPlan], console: Console, command: str) -> None:
    """Write ``summary.json``, ``table.md`` and ``safety.png`` on what is finished; raises DataError when nothing is."""
    cells = [Cell(f.malicious, f.defence, f.attack, f.partition, f.name) for f in FEDERATIONS]
    console.print(write_report(out, plans, cells, command), markup=False, highlight=False, soft_wrap=True)


def run_batch(
    batch: Batch, plan: DemoPlan, data: DemoData, processes: Processes, services: list[Service], stages: Stages
) -> None:
    """Train federations and evaluate each one's last adapter, beside the training of the next one."""
    waiting = list(batch.federations)

    def evaluate_finished() -> None:
        while waiting and finished_rounds(plan.arm_dir(waiting[0].name)) == plan.rounds:
            federation = waiting.pop(0)
            stages.step(f"{federation.name} is trained")
            if not (plan.arm_dir(federation.name) / "eval" / f"round-{plan.rounds}" / "summary.json").exists():
                evaluate(plan, processes, services, data, federation.name, plan.rounds)
            stages.step(f"{federation.name} is evaluated")

    files = [write_config(plan, services, data, federation) for federation in batch.federations]
    command = [sys.executable, "-m", "trainer.in_process", *map(str, files), *batch.flags]
    processes.run("trainer", command, meanwhile=evaluate_finished)


def write_config(plan: DemoPlan, services: Sequence[Service], data: DemoData, federation: Federation) -> Path:
    """Write one federation's run-config file."""
    changes = DEFENCES[federation.defence] | SIZES
    changes |= {"placement": "concentrated", "partition": federation.partition, "min-clients": plan.clients // 2}
    if most := WITHSTANDS.get(federation.defence):
        changes |= {"malicious-clients": min(most, federation.malicious), "min-clients": plan.clients}
    if federation.attack == "mixed":
        changes |= {"shard-data": write_mixed_shards(plan, data, federation.malicious)}
        changes |= {"benign-data": "", "harmful-data": "", "harmful-share": 0.0}
    else:
        changes |= {"harmful-share": federation.malicious / plan.clients}
    return write_run_config(plan, services, data, federation.name, changes)


def write_mixed_shards(plan: DemoPlan, data: DemoData, malicious: int) -> str:
    """Write shards of which the first ones are half harmful and half harmless; returns their path, with {shard}."""
    benign, harmful = iter(read_lines(data.benign)), iter(read_lines(data.harmful))
    folder = plan.out / "data" / "mixed"
    folder.mkdir(exist_ok=True)
    for client in range(plan.clients):
        bad = plan.samples_per_client // 2 if client < malicious else 0
        shard = [*take(harmful, bad), *take(benign, plan.samples_per_client - bad)]
        (folder / f"{client}.jsonl").write_text("".join(f"{line}\n" for line in shard), encoding="utf-8")
    return str(folder.resolve() / "{shard}.jsonl")


def read_lines(path: Path) -> list[str]:
    """The lines of a file of pairs, as they are; ``str.splitlines`` would split at characters that JSON may hold."""
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]


def take(lines: Iterable[str], number: int) -> list[str]:
    """The next lines of an iterator."""
    return list(islice(lines, number))
