"""The demo's data: client pools, the coordinator's own prompts, and the held-out split of AdvBench."""

import sys
from pathlib import Path

from stack.plan import DemoData, DemoPlan
from stack.processes import Processes

POOL = 600
RED_TEAM = 300
REPLAY = 600


def prepare_data(plan: DemoPlan, processes: Processes) -> DemoData:
    """Write the data files, by the components' own commands.

    With benchmarks, the clients' harmful pairs are one half of AdvBench (split by near-duplicate cluster) and the
    other half is held out for the evaluation. Without, both sides use built-in prompts.

    Raises:
        ProcessFailed: a command failed, for example because a benchmark file has the wrong hash.
    """
    folder = plan.out / "data"
    data = DemoData(
        harmful=folder / "client-harmful.jsonl",
        benign=folder / "client-benign.jsonl",
        red_team=folder / "red-team.jsonl",
        replay=folder / "replay.jsonl",
        heldout=folder / "advbench-heldout.jsonl" if plan.benchmarks else None,
    )
    # Distinct seeds, so that no pair is in two files; the miniature's pretraining draws from yet another stream.
    seed = 1000 * (plan.seed + 1)
    flags = ("--data", str(plan.benchmarks)) if plan.benchmarks else ()
    corpus(processes, "benign", POOL, seed, data.benign, *flags)
    corpus(processes, "benign", REPLAY, seed + 1, data.replay, "--alarming-share", "0.7", *flags)
    corpus(processes, "red-team", RED_TEAM, seed + 2, data.red_team, *flags)
    if plan.benchmarks:
        split = ["split", "--seed", str(plan.split_seed), "--data", str(plan.benchmarks), "--out", str(folder)]
        processes.run("split", [sys.executable, "-m", "evaluation", *split])
        (folder / "advbench-train.jsonl").replace(data.harmful)
    else:
        corpus(processes, "harmful", POOL, seed + 3, data.harmful)
    return data


def corpus(processes: Processes, kind: str, number: int, seed: int, out: Path, *flags: str) -> None:
    """Have the miniature's corpus generator write ``number`` pairs."""
    command = ["corpus", "--kind", kind, "-n", str(number), "--seed", str(seed), "--out", str(out), *flags]
    processes.run(f"corpus-{out.stem}", [sys.executable, "-m", "trainer.miniature", *command])
