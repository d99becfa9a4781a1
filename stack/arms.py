"""Train the demo's federations and evaluate every round's adapter."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from services.common.http import ServiceClient
from services.contracts.adapters import AdapterInfo, LoadAdapterRequest, UnloadAdapterRequest, read_manifest
from stack.plan import DemoData, DemoPlan
from stack.processes import Processes, Service
from stack.toml import write_toml
from stack.up import BASE_MODEL


def train_arms(
    plan: DemoPlan, processes: Processes, services: Sequence[Service], data: DemoData, on_round: Callable[[str], None]
) -> None:
    """Run one federation per arm, one after the other on one Flower SuperLink.

    Args:
        plan: the demo's size and seeds.
        processes: what runs the trainer's command.
        services: safety, critique and inference.
        data: the data files.
        on_round: told the arm, each time one of its rounds is done.

    Raises:
        ProcessFailed: a federation ended with an error, or a service ended meanwhile.
    """
    files = [write_run_config(plan, services, data, arm) for arm in plan.arms]
    told = dict.fromkeys(plan.arms, 0)

    def tell() -> None:
        for arm in plan.arms:
            for _ in range(finished_rounds(plan.arm_dir(arm)) - told[arm]):
                told[arm] += 1
                on_round(arm)

    processes.run("trainer", [sys.executable, "-m", "trainer", "run", *map(str, files)], meanwhile=tell)


def write_run_config(
    plan: DemoPlan,
    services: Sequence[Service],
    data: DemoData,
    arm: str,
    changes: Mapping[str, str | int | float] = MappingProxyType({}),
) -> Path:
    """Write the run-config keys of one arm that differ from the defaults in pyproject.toml; returns the TOML file.

    ``changes`` go before the keys that the plan and the arm's name give.
    """
    url = {service.name: service.url for service in services}
    values: dict[str, str | int | float] = {
        "resume": True,
        "run-dir": str(plan.arm_dir(arm).resolve()),
        "arm": "none" if arm == "clean" else arm,
        "harmful-share": 0.0 if arm == "clean" else plan.harmful_share,
        "seed": plan.seed,
        "split-seed": plan.split_seed,
        "rounds": plan.rounds,
        "num-clients": plan.clients,
        "clients-per-round": plan.clients,
        "min-clients": max(1, plan.clients // 2),
        "samples-per-client": plan.samples_per_client,
        "benign-data": str(data.benign.resolve()),
        "harmful-data": "" if arm == "clean" else str(data.harmful.resolve()),
        "red-team-data": str(data.red_team.resolve()),
        "replay-data": str(data.replay.resolve()),
        "safety-url": url["safety"],
        "critique-url": url["critique"],
        "coordinator-critique-url": url["critique"],
        "inference-url": url["inference"],
        **changes,
    }
    return write_toml(plan.out / "data" / f"run-{arm}.toml", values)


def finished_rounds(run_dir: Path) -> int:
    """How many rounds a run folder holds."""
    try:
        return (run_dir / "rounds.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def evaluate(
    plan: DemoPlan, processes: Processes, services: Sequence[Service], data: DemoData, arm: str, round_number: int
) -> None:
    """Evaluate one round's adapter (round 0: the untouched model) over HTTP, with the safety service as judge.

    Raises:
        AdapterError: the adapter is not what its manifest says.
        ProcessFailed: the evaluation failed, for example because too many answers stayed unscored.
        UpstreamError: the inference service did not load the adapter.
    """
    processes.check_services()
    safety, inference = (next(s for s in services if s.name == name) for name in ("safety", "inference"))
    out = plan.out / "base" / "eval" if round_number == 0 else plan.arm_dir(arm) / "eval" / f"round-{round_number}"
    command = [
        "run", "--target", inference.url, "--judge", safety.url, "--out", str(out),
        "--arm", arm, "--round", str(round_number), "--split-seed", str(plan.split_seed),
    ]  # fmt: skip
    command += ["--heldout", str(data.heldout)] if data.heldout else []
    command += ["--data", str(plan.benchmarks)] if plan.benchmarks else []
    command += ["--limit", str(plan.limit)] if plan.limit else []
    with ServiceClient("inference", inference.url) as client:
        model = BASE_MODEL if round_number == 0 else load(client, plan.adapter_dir(arm, round_number), arm)
        run = [sys.executable, "-m", "evaluation", *command, "--model", model]
        processes.run(f"evaluate-{arm}-{round_number}", run)
        if round_number:
            client.post("/v1/unload_lora_adapter", UnloadAdapterRequest(lora_name=model), AdapterInfo)


def load(client: ServiceClient, adapter: Path, arm: str) -> str:
    """Load an adapter under the name ``<arm>-<round>``; returns the name."""
    manifest = read_manifest(adapter)
    name = f"{arm}-{adapter.name}"
    request = LoadAdapterRequest(lora_name=name, lora_path=str(adapter.resolve()), sha256=manifest.sha256)
    client.post("/v1/load_lora_adapter", request, AdapterInfo)
    return name
