"""What ``make federation`` runs, and where everything of it lies."""

from dataclasses import dataclass
from pathlib import Path

from services.common.ports import free_port
from stack.federation.credentials import Credentials
from stack.federation.network import Network
from stack.toml import Value, write_toml


@dataclass(frozen=True)
class FederationPlan:
    """Size and seed of a small federation; the defaults take about three minutes on two cores.

    ``separated`` gives each party a network namespace of its own, where that is permitted.
    """

    out: Path
    silos: int = 3
    rounds: int = 2
    benign_pairs: int = 24
    harmful_pairs: int = 8
    seed: int = 0
    arm: str = "filter"
    separated: bool = True

    @property
    def credentials(self) -> Credentials:
        """All keys and certificates, which on separate machines would be apart."""
        return Credentials(self.out / "certs")

    @property
    def run_dir(self) -> Path:
        """The coordinator's run folder: rounds and adapters."""
        return self.out / "run"

    @property
    def bundle(self) -> Path:
        """The app bundle."""
        return self.out / "fedward.fab"

    def silo(self, number: int) -> str:
        """A silo's name."""
        return f"silo-{number}"

    def shard(self, number: int) -> Path:
        """A silo's data."""
        return self.out / self.silo(number) / "shard.jsonl"

    def run_values(self) -> dict[str, Value]:
        """The run-config keys that differ from pyproject's defaults; the coordinator names no data."""
        return {
            "run-dir": str(self.run_dir.resolve()),
            "silo-data": True,
            "arm": self.arm,
            "seed": self.seed,
            "rounds": self.rounds,
            "num-clients": self.silos,
            "clients-per-round": self.silos,
            "min-clients": max(1, self.silos - 1),
        }


def write_configs(plan: FederationPlan, net: Network) -> tuple[Path, list[Path]]:
    """Write the files that the coordinator and each silo are started with; returns their paths."""
    files, fleet_port = plan.credentials, 9092 if net.separated else free_port()
    run_config = write_toml(plan.out / "run.toml", plan.run_values())
    coordinator: dict[str, Value | list[str]] = {
        "state_dir": _absolute(plan.out / "coordinator"),
        "run_dir": _absolute(plan.run_dir),
        "run_config": _absolute(run_config),
        "credentials_dir": _absolute(files.folder),
        "silo_keys": [_absolute(files.silo_key(plan.silo(i)).with_suffix(".key.pub")) for i in range(plan.silos)],
        "bundle": _absolute(plan.bundle),
        "fleet_bind": f":{fleet_port}" if net.separated else f"127.0.0.1:{fleet_port}",
        "status_bind": f"127.0.0.1:{free_port()}",
        "superlink_port": free_port(),
    }
    silos = []
    for number in range(plan.silos):
        name = plan.silo(number)
        values: dict[str, Value] = {
            "number": number,
            "state_dir": _absolute(plan.out / name),
            "superlink": f"{net.addresses[number]}:{fleet_port}",
            "authority": _absolute(files.authority),
            "private_key": _absolute(files.silo_key(name)),
            "task_secret": _absolute(files.task_secret(name)),
            "trusted_entities": _absolute(files.trusted_entities),
            "shard": _absolute(plan.shard(number)),
            "runtime_port": free_port(),
        }
        if "filter" in plan.arm:
            values["safety_port"] = free_port()
        silos.append(write_toml(plan.out / f"{name}.toml", values))
    return write_toml(plan.out / "coordinator.toml", coordinator), silos


def _absolute(path: Path) -> str:
    return str(path.resolve())
