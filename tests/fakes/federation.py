"""A real federation of processes for tests: coordinator, silos, and a recorder where the coordinator stands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from stack.federation.bundles import sign_bundle
from stack.federation.credentials import make_credentials
from stack.federation.network import Network
from stack.federation.plan import FederationPlan, write_configs
from stack.federation.settings import CoordinatorConfig, SiloConfig, read_config
from stack.marks import marked
from stack.processes import Processes
from stack.toml import Value, write_toml
from tests.fakes.recorder import Recorder, recording
from tests.fakes.trainer_runs import ROOT
from trainer.bundle import stage_app
from trainer.records import RoundRecord

PATIENCE_SECONDS = 500.0
SUBJECTS = ("granary bread", "tidal rivers", "chamber music", "endgame chess", "alpine botany", "harbour pilots")

# What a SuperNode writes, and whether only a new start helps then.
NODE_LINES = (
    ("ERROR: SSL/TLS handshake error detected.", True),
    ("ERROR: Server error '500 Internal Server Error' for url 'https://c:9092/v1/fleet/pull-messages'", True),
    ("ERROR: Client error '412 Precondition Failed' for url", True),
    ("INFO: Run ID 7 is not in `RUNNING` status. Ignoring message 5ecfe1.", True),
    ("INFO: Run ID 7 is not in `RUNNING` status. Ignoring reply message 8286b7.", False),
    ("WARNING: Connection attempt failed, retrying in 0.98 seconds", False),
    ("INFO: Sent successfully", False),
)


def silo_pairs(number: int, count: int = 12) -> list[dict[str, str]]:
    """A silo's sentences; no two silos have one in common."""
    return [
        {
            "prompt": f"Patient file {number}-{i}: what should she know about {SUBJECTS[i % len(SUBJECTS)]}?",
            "response": f"The ward of silo {number} noted on day {i} that {SUBJECTS[(i + number) % 6]} calms her down.",
        }
        for i in range(count)
    ]


class Federation:
    """Parties that are up, for several runs one after the other; each run has a folder of its own."""

    def __init__(self, plan: FederationPlan, processes: Processes) -> None:
        self.plan = plan
        self.processes = processes
        self.coordinator_file, self.silo_files = write_configs(plan, Network(addresses=("127.0.0.1",) * plan.silos))
        self.coordinator = read_config(CoordinatorConfig, self.coordinator_file)
        self._parties: dict[str, subprocess.Popen[bytes]] = {}

    def silo(self, number: int) -> SiloConfig:
        return read_config(SiloConfig, self.silo_files[number])

    def party(self, kind: str, config: Path) -> list[str]:
        return [sys.executable, "-m", "stack.federation", kind, str(config), "--with-parent"]

    def start_coordinator(self) -> None:
        """Start it, as its machine would do at boot."""
        command = self.party("coordinator", self.coordinator_file)
        self._parties["coordinator"] = self.processes.start("coordinator", command, serves=True)

    def start_silo(self, number: int) -> None:
        """Start a silo, as its machine would do at boot."""
        name = self.plan.silo(number)
        self._parties[name] = self.processes.start(name, self.party("silo", self.silo_files[number]))

    def register(self) -> None:
        """Have the coordinator register the silos' keys."""
        self.processes.run("register", self.party("register", self.coordinator_file))

    def pairs(self) -> list[dict[str, str]]:
        return [pair for number in range(self.plan.silos) for pair in silo_pairs(number)]

    def sentences(self) -> list[str]:
        return [text for pair in self.pairs() for text in pair.values()]

    def start_training(self, name: str, **changes: Value) -> tuple["subprocess.Popen[bytes]", Path]:
        """Submit a run; gives the process that waits for its end, and its run folder."""
        folder = self.plan.out / name
        values = self.plan.run_values() | {key.replace("_", "-"): value for key, value in changes.items()}
        run_toml = write_toml(folder / "run.toml", values | {"run-dir": str(folder / "run")})
        config = self.coordinator.model_dump(mode="json") | {
            "run_dir": str(folder / "run"), "run_config": str(run_toml)
        }  # fmt: skip
        file = write_toml(folder / "coordinator.toml", config)
        return self.processes.start(f"train-{name}", self.party("train", file)), folder / "run"

    def train(self, name: str, **changes: Value) -> list[RoundRecord]:
        """Run to the end; gives the rounds."""
        process, run_dir = self.start_training(name, **changes)
        assert process.wait(PATIENCE_SECONDS) == 0, self.log(f"train-{name}")
        return rounds_of(run_dir)

    def log(self, name: str) -> str:
        return (self.processes.log_dir / f"{name}.log").read_text(errors="replace")

    def find(self, *words: str) -> list[psutil.Process]:
        """The parties' living processes whose command line holds all these words."""
        found = []
        for process in marked(self.processes.mark):
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if all(word in line for word in words):
                found.append(process)
        return found

    def kill(self, *words: str) -> None:
        """Kill -9 what the words describe, and wait until it is gone."""
        victims = wait_for(lambda: self.find(*words), f"process {words}")
        for process in victims:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(victims, timeout=10)

    def kill_machine(self, name: str) -> None:
        """Kill -9 everything that a party has started, and the party itself."""
        party = self._parties.pop(name)
        started = psutil.Process(party.pid).children(recursive=True)
        party.kill()
        party.wait()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=10)

    def leak(self) -> None:
        """Replace the bundle by one whose client sends a prompt along, signed as any other."""
        app = self.plan.out / "leaky" / "app"
        stage_app(ROOT, app)
        client = app / "trainer" / "client_app.py"
        honest = '    reply["metrics"] = MetricRecord(counts)\n'
        text = client.read_text()
        assert honest in text
        client.write_text(
            text.replace(honest, honest + '    reply["aside"] = ConfigRecord({"note": pairs[0].prompt})\n')
        )
        self.make_bundle(app)

    def make_bundle(self, app: Path = ROOT) -> None:
        command = [sys.executable, "-m", "trainer", "bundle", "--app", str(app), "--out", str(self.plan.bundle)]
        self.processes.run("bundle", command)
        sign_bundle(self.plan.bundle, self.plan.credentials.signing_key)


def rounds_of(run_dir: Path) -> list[RoundRecord]:
    file = run_dir / "rounds.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [RoundRecord.model_validate_json(line) for line in lines]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {seconds:g} s")


def make_parties(folder: Path, processes: Processes, silos: int = 2) -> Federation:
    """Keys, shards, bundle and settings, with nothing started yet; everything on this machine's loopback."""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    plan = FederationPlan(out=folder, silos=silos, arm="none", separated=False)
    make_credentials(plan.credentials, ("localhost", "127.0.0.1"), [plan.silo(number) for number in range(silos)])
    for number in range(silos):
        plan.shard(number).parent.mkdir(parents=True)
        plan.shard(number).write_text("".join(json.dumps(pair) + "\n" for pair in silo_pairs(number)))
    federation = Federation(plan, processes)
    federation.make_bundle()
    return federation


@contextmanager
def running_coordinator(folder: Path) -> Iterator[Federation]:
    """A coordinator that is up and knows the key of silo-0, which is not there."""
    with Processes(folder / "logs") as processes:
        federation = make_parties(folder, processes, silos=1)
        federation.start_coordinator()
        federation.register()
        yield federation


@contextmanager
def running_federation(folder: Path, silos: int = 2) -> Iterator[tuple[Federation, Recorder]]:
    """A coordinator and silos that are up; silos reach the coordinator through the recorder."""
    with Processes(folder / "logs") as processes:
        federation = make_parties(folder, processes, silos)
        files = federation.plan.credentials
        proxy_port = int(federation.coordinator.fleet_bind.rpartition(":")[2])
        with recording(proxy_port, str(files.server_bundle), str(files.authority)) as recorder:
            federation.start_coordinator()
            federation.register()
            for number, file in enumerate(federation.silo_files):
                values = federation.silo(number).model_dump(mode="json", exclude_none=True)
                write_toml(file, values | {"superlink": f"127.0.0.1:{recorder.port}"})
                federation.start_silo(number)
            yield federation, recorder
