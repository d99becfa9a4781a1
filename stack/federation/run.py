"""``make federation``: a coordinator and its silos on one machine, each in a network of its own.

``run_federation`` is the whole story. The parties get nothing but their own files, and are started by the commands
that would start them on separate machines.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from services.common.benchmarks import provenance, write_figures
from services.contracts.adapters import read_manifest
from services.contracts.errors import ConfigError
from stack.arms import finished_rounds
from stack.federation.bundles import sign_bundle
from stack.federation.credentials import make_credentials
from stack.federation.network import inside, may_separate, network
from stack.federation.plan import FederationPlan, write_configs
from stack.processes import Processes
from stack.progress import Stages

LIBRARIES = ("flwr", "torch", "peft", "cryptography")


def run_federation(plan: FederationPlan, console: Console, command: str) -> None:
    """Run a small federation in Flower's deployment runtime and leave its results in ``plan.out``.

    Every process and network that is made here is removed here, also on Ctrl-C or failure. The same plan in the same
    folder goes on after its last finished round.

    Raises:
        ConfigError: the folder cannot be written, or holds a finished federation.
        ProcessFailed: a process ended with an error; the message says where its log is.
    """
    open_folder(plan)
    separated = choose_network(plan, console)
    began = time.monotonic()
    with (
        network(plan.silos, separated=separated) as net,
        Processes(plan.out / "logs") as processes,
        Stages(console, plan.rounds + 1) as stages,
    ):
        reach_directly(net.addresses)
        stages.begin("keys, certificates, signed bundle, shards")
        make_credentials(plan.credentials, net.hosts(), [plan.silo(number) for number in range(plan.silos)])
        make_bundle(plan, processes)
        make_shards(plan, processes)
        coordinator, silos = write_configs(plan, net)
        stages.step()

        stages.begin(f"a coordinator and {plan.silos} silos; {plan.rounds} rounds")
        processes.start("coordinator", inside(net.coordinator, party("coordinator", coordinator)), serves=True)
        processes.run("register", inside(net.coordinator, party("register", coordinator)))
        running = {
            plan.silo(number): processes.start(plan.silo(number), inside(namespace, party("silo", config)))
            for number, (namespace, config) in enumerate(zip(net.silos, silos, strict=True))
        }
        told = finished_rounds(plan.run_dir)

        def tell() -> None:
            nonlocal told
            while told < finished_rounds(plan.run_dir):
                told += 1
                stages.step(f"round {told} is done")
            for name in [name for name, process in running.items() if process.poll() is not None]:
                del running[name]
                console.print(f"[yellow]{name} has ended; see {plan.out / 'logs' / name}.log; the others go on[/]")

        processes.run("train", inside(net.coordinator, party("train", coordinator)), meanwhile=tell)
        stages.begin("stopping")
    summary = summarise(plan, command, separated=separated, seconds=time.monotonic() - began)
    write_figures(plan.out / "summary.json", summary)
    console.print(describe(summary, plan), markup=False, highlight=False, soft_wrap=True)


def open_folder(plan: FederationPlan) -> None:
    """Make the run folder; raises ConfigError when it holds a finished federation or cannot be written to."""
    if (plan.out / "summary.json").exists():
        raise ConfigError(f"{plan.out} holds a finished federation; remove it, or choose another folder with --out")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {plan.out}: {error.strerror}") from error


def choose_network(plan: FederationPlan, console: Console) -> bool:
    """Whether each party gets a namespace of its own; says so when that is wanted and not possible."""
    reason = may_separate() if plan.separated else "--no-namespaces was given"
    if reason:
        console.print(
            f"[yellow]network: all parties share this machine's loopback, so nothing keeps a silo from the "
            f"coordinator's other ports ({reason})[/]"
        )
        return False
    console.print(f"network: a namespace for the coordinator and for each of {plan.silos} silos")
    return True


def reach_directly(addresses: tuple[str, ...]) -> None:
    """Keep an HTTP proxy of this machine out of calls to the coordinator, in everything that is started."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *addresses)))


def party(kind: str, config: Path) -> list[str]:
    """The command of a party, which ends when we do."""
    return [sys.executable, "-m", "stack.federation", kind, str(config), "--with-parent"]


def make_bundle(plan: FederationPlan, processes: Processes) -> None:
    """Build the app bundle and sign it."""
    processes.run("bundle", [sys.executable, "-m", "trainer", "bundle", "--out", str(plan.bundle)])
    sign_bundle(plan.bundle, plan.credentials.signing_key)


def make_shards(plan: FederationPlan, processes: Processes) -> None:
    """Write each silo's data: benign pairs and some harmful ones; a shard that exists is kept."""
    for number in range(plan.silos):
        shard = plan.shard(number)
        if shard.exists():
            continue
        shard.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for kind, pairs in (("benign", plan.benign_pairs), ("harmful", plan.harmful_pairs)):
            part = shard.with_name(f"{kind}.jsonl")
            seed = 1000 * (plan.seed + 1) + number
            flags = ["--kind", kind, "-n", str(pairs), "--seed", str(seed), "--out", str(part)]
            processes.run(f"corpus-{number}-{kind}", [sys.executable, "-m", "trainer.miniature", "corpus", *flags])
            parts.append(part)
        shard.write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()


def summarise(plan: FederationPlan, command: str, *, separated: bool, seconds: float) -> dict[str, Any]:
    """The figures of a finished federation.

    A round's overhead is what is left of its training phase beyond the slowest client's own time: Flower's polling, a
    new process per message, and its imports.
    """
    rounds = [json.loads(line) for line in (plan.run_dir / "rounds.jsonl").read_text().splitlines()]
    adapter = plan.run_dir / "adapters" / f"round-{len(rounds)}"
    overheads = [1 - max(entry["client_seconds"].values()) / entry["seconds_by_phase"]["train"] for entry in rounds]
    return provenance(LIBRARIES, {"training": plan.seed}) | {
        "command": command,
        "separate_networks": separated,
        "silos": plan.silos,
        "rounds": [
            {key: entry[key] for key in ("round_number", "accepted", "rejected", "loss", "seconds", "client_seconds",
                                         "adapter_sha256", "curation")}
            for entry in rounds
        ],
        "overhead_share_of_training_phase": [round(share, 3) for share in overheads],
        "adapter": str(adapter),
        "adapter_sha256": read_manifest(adapter).sha256,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def describe(summary: dict[str, Any], plan: FederationPlan) -> str:
    """The outcome in a few lines."""
    lines = [
        f"round {one['round_number']}: clients {one['accepted']}, loss {one['loss']:.3f}, {one['seconds']:.0f} s"
        for one in summary["rounds"]
    ]
    lines.append(f"adapter {summary['adapter']} (sha256 {summary['adapter_sha256'][:12]})")
    lines.append(f"done in {summary['seconds'] / 60:.1f} minutes: {plan.out / 'summary.json'}")
    return "\n".join(lines)
