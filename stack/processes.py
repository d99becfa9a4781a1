"""Start processes, wait until they serve, and stop every one of them whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from services.contracts.errors import ConfigError, FedwardError

STOP_SECONDS = 15.0
READY_SECONDS = 180.0


class ProcessFailed(FedwardError):
    """A process that was started ended with an error; the message says where its log is."""

    code = "process_failed"
    exit_code = 7


@dataclass(frozen=True)
class Service:
    """One HTTP process to start: its name, the module that ``python -m`` runs, its port, and further flags."""

    name: str
    module: str
    port: int
    flags: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


class Processes:
    """The processes that this command started. Leaving the ``with`` block stops them all, last started first."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {log_dir}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, with its output in ``<log_dir>/<name>.log``."""
        with (self.log_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env=child_environment() | dict(env or {}),
            )  # fmt: skip
        self.running[name] = process
        return process

    def start_services(self, services: Sequence[Service]) -> None:
        """Start HTTP processes and wait until all of them are ready.

        Raises:
            ProcessFailed: one ended, or was not ready in time.
        """
        for service in services:
            self.start(
                service.name, [sys.executable, "-m", service.module, "--port", str(service.port), *service.flags]
            )
        for service in services:
            self.wait_ready(service)

    def wait_ready(self, service: Service, timeout_seconds: float = READY_SECONDS) -> None:
        """Wait until the service says that it is ready.

        Raises:
            ProcessFailed: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        reason = "no answer"
        while time.monotonic() < deadline:
            if self.running[service.name].poll() is not None:
                raise self.failure(service.name)
            try:
                answer = httpx.get(f"{service.url}/health/ready", timeout=2.0)
                if answer.status_code == 200:
                    return
                reason = answer.text[:200]
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise ProcessFailed(
            f"{service.name} was not ready within {timeout_seconds:.0f} s ({reason}); {self._log(service.name)}"
        )

    def run(self, name: str, argv: Sequence[str]) -> None:
        """Run a command to its end; raises ProcessFailed when its exit code is not 0."""
        self.start(name, argv)
        self.finish(name)

    def finish(self, name: str) -> None:
        """Wait for a command to end.

        Raises:
            ProcessFailed: its exit code is not 0.
        """
        if self.running[name].wait() != 0:
            raise self.failure(name)
        del self.running[name]

    def failure(self, name: str) -> ProcessFailed:
        """The error for a process that has ended, with the end of its log."""
        process = self.running.pop(name)
        lines = (self.log_dir / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return ProcessFailed(
            "\n".join([f"{name} ended with code {process.returncode}; {self._log(name)}", *lines[-5:]])
        )

    def stop(self) -> None:
        """Ask every process group to end, wait, and kill what is left."""
        for name in reversed(list(self.running)):
            stop_group(self.running.pop(name))

    def _log(self, name: str) -> str:
        return f"see {self.log_dir / name}.log"


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to a process's group, and SIGKILL after a grace period. The group outlives its leader's end."""
    for kind, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def child_environment() -> dict[str, str]:
    """The environment for child processes: one thread each, compiled bytecode kept, no network look-ups.

    Without bytecode every start pays several seconds of compilation.
    """
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **env}


def free_port() -> int:
    """A TCP port on this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether nothing listens on that port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def interrupt_on_signals() -> None:
    """Make SIGTERM and a closed terminal end the program as Ctrl-C does, so that ``with`` blocks clean up."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)
