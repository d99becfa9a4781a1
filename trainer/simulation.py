"""A private Flower simulation: start a SuperLink, run federations on it, stop every process it led to.

``flwr run`` alone leaves a SuperLink running in the background and exits with 0 when the run failed. Here the
SuperLink is ours, its state lives in a folder that is removed, and the run's own ``result.json`` gives the outcome.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from services.common.ports import free_port
from services.contracts.errors import FedwardError
from trainer.bundle import stage_app
from trainer.config import RunConfig
from trainer.records import RunResult
from trainer.run_folder import read_result

START_SECONDS = 60.0
STOP_SECONDS = 4.0
OBJECT_STORE_BYTES = 200_000_000  # adapters are small; Ray would otherwise reserve a third of the memory
CONNECTION = "private"
HOME_PREFIX = "fedward-"
OWNER = "owner"  # a file in a simulation's home that is locked for as long as its process lives
GUARD = "import pathlib, sys, trainer.simulation as s; s.clean_up_after_a_kill(pathlib.Path(sys.argv[1]))"


class SimulationFailed(FedwardError):
    """Flower's processes did not start or ended unexpectedly."""

    code = "simulation_failed"
    exit_code = 9


class Simulation:
    """Flower's simulation runtime for as long as the ``with`` block lasts.

    Args:
        app: the folder with ``pyproject.toml`` and ``trainer/``.
        log_file: where the SuperLink writes.
        parallel_clients: how many clients train at the same time, one CPU core each.
    """

    def __init__(self, app: Path, log_file: Path, parallel_clients: int = 2) -> None:
        self._app = app
        self._log_file = log_file
        self._parallel_clients = parallel_clients
        # Directly under /tmp: the paths of Ray's sockets must stay under 108 bytes.
        _remove_orphans()
        self._home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX, dir="/tmp"))
        self._owner = (self._home / OWNER).open("wb")
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        self._bin = Path(sys.executable).parent
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start_guard()
            stage_app(self._app, self._home / "app")
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, config: RunConfig, overrides: Path) -> RunResult:
        """Run one federation to its end, with Flower's log on stdout.

        Args:
            config: the whole configuration, for the number of clients and the run folder.
            overrides: the TOML file that ``flwr run`` is given; ``config`` is its content on top of the defaults.
        """
        (config.run_dir / "result.json").unlink(missing_ok=True)
        federation = (
            f"num-supernodes={config.num_clients} client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
            f"init-args-num-cpus={self._parallel_clients} init-args-log-to-driver=false"
        )
        command = [str(self._bin / "flwr"), "run", str(self._home / "app"), CONNECTION, "--stream"]
        options = ["--run-config", str(overrides.resolve()), "--federation-config", federation]
        # A session of its own keeps Ctrl-C from it: this process decides in which order to stop.
        with subprocess.Popen([*command, *options], env=self._environment(), start_new_session=True) as client:
            code = client.wait()
        result = read_result(config.run_dir)
        if result is None:
            raise SimulationFailed(f"flwr run ended with code {code} and no result; see {self._log_file}")
        return result

    def _start_guard(self) -> None:
        """Start the process that cleans up if this one is killed: it waits for the pipe between the two to break.

        Otherwise the federation would go on, and write to a run folder that the next attempt resumes from.
        """
        command = [sys.executable, "-c", GUARD, str(self._home)]
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._environment(), start_new_session=True)
        self._children.append(guard)

    def _start(self) -> None:
        port = free_port()
        address = f"127.0.0.1:{port}"
        connections = f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
        (self._home / "config.toml").write_text(connections + "insecure = true\n", encoding="utf-8")
        command = [
            str(self._bin / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
            "--host", "127.0.0.1", "--port", str(port), "--database", str(self._home / "state.db"),
            "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        with self._log_file.open("ab") as log:
            superlink = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True
            )
        self._children.append(superlink)
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(address):
            if superlink.poll() is not None:
                raise SimulationFailed(f"the SuperLink ended with code {superlink.returncode}; see {self._log_file}")
            if time.monotonic() > deadline:
                raise SimulationFailed(f"the SuperLink is not up after {START_SECONDS:g} s; see {self._log_file}")
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return {
            "OMP_NUM_THREADS": "1",
            **env,
            "PATH": f"{self._bin}{os.pathsep}{env.get('PATH', '')}",
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "RAY_TMPDIR": str(self._home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def _stop(self) -> None:
        self._owner.close()
        _end_processes(self._home, psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill)
        for child in self._children:
            with child:  # takes note of its end, and closes the pipe to it
                pass
        shutil.rmtree(self._home, ignore_errors=True)


def _remove_orphans() -> None:
    """Remove the homes of simulations that were killed together with their guard: nobody holds their lock."""
    for owner in Path("/tmp").glob(f"{HOME_PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError), owner.open("rb") as file:  # another user's, or one that is being removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


def clean_up_after_a_kill(home: Path) -> None:
    """What the guard does: wait until the process that started it is gone, then end what that one left behind."""
    sys.stdin.read()
    _end_processes(home, psutil.Process.kill, psutil.Process.kill)
    shutil.rmtree(home, ignore_errors=True)


def _end_processes(home: Path, *ways: Callable[[psutil.Process], None]) -> None:
    """End every process of a simulation, however deep, in one way after the other: they have its home in common."""
    for end in ways:
        processes = _processes_of(home)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(processes, timeout=STOP_SECONDS)


def _processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home) and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/health", timeout=2.0).is_success
    except httpx.TransportError:
        return False
