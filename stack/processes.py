"""Start processes, wait until they serve, and stop every one of them whatever happens."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from services.contracts.errors import ConfigError, FedwardError
from stack.marks import kill_marked, new_mark
from stack.running import Running, start_process

STOP_SECONDS = 30.0  # a service lets in-flight requests finish for up to 20 s
READY_SECONDS = 180.0
POLL_SECONDS = 0.3
FULL_DISK_BYTES = 100_000


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
    """The processes that this command started. Leaving the ``with`` block stops them all, last started first.

    Raises:
        ConfigError: the folder of logs cannot be written to.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.mark = new_mark()
        self._running: dict[str, Running] = {}
        self._left = False
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=log_dir):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write to {log_dir}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str], *, serves: bool = False) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, with its output in ``<log_dir>/<name>.log``.

        Args:
            name: what it is called in messages.
            argv: the command.
            serves: it is to run until it is stopped, so its end is a failure.
        """
        running = start_process(argv, self.log_dir / f"{name}.log", self.mark, serves=serves)
        self._running[name] = running
        return running.process

    def start_services(self, services: Sequence[Service]) -> None:
        """Start HTTP processes and wait until all of them are ready.

        Raises:
            ProcessFailed: one ended, or was not ready in time.
        """
        for service in services:
            argv = [sys.executable, "-m", service.module, "--port", str(service.port), *service.flags]
            self.start(service.name, argv, serves=True)
        for service in services:
            self.wait_ready(service)

    def wait_ready(self, service: Service, timeout_seconds: float = READY_SECONDS) -> None:
        """Wait until the service says that it is ready.

        Raises:
            ProcessFailed: a service ended, or this one was not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        reason = "no answer"
        while time.monotonic() < deadline:
            self.check_services()
            try:
                answer = httpx.get(f"{service.url}/health/ready", timeout=2.0)
                if answer.status_code == 200:
                    return
                reason = answer.text[:200]
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        log = self._running[service.name].log
        raise ProcessFailed(f"{service.name} was not ready within {timeout_seconds:.0f} s ({reason}); see {log}")

    def check_services(self) -> None:
        """Raise ProcessFailed when a service has ended although nobody stopped it."""
        for name, running in self._running.items():
            if running.serves and running.has_ended():
                raise self._failure(name)

    def run(self, name: str, argv: Sequence[str], meanwhile: Callable[[], None] = lambda: None) -> str:
        """Run a command to its end.

        Args:
            name: what it is called in messages.
            argv: the command.
            meanwhile: called a few times a second while it runs, and once after it.

        Returns:
            What the command wrote.

        Raises:
            ProcessFailed: its exit code is not 0, or a service ended meanwhile.
        """
        process = self.start(name, argv)
        while not self._running[name].ended_within(POLL_SECONDS):
            self.check_services()
            meanwhile()
        meanwhile()
        if process.returncode != 0:
            self.check_services()  # a service that is gone is the better explanation
            raise self._failure(name)
        return self._running.pop(name).output()

    def output(self, name: str) -> str:
        """What the process of that name has written since it was started last."""
        return self._running[name].output()

    def stop(self) -> None:
        """Ask every process to end, one after the other, and kill what is left of them and of all they started."""
        if self._left:
            return
        try:
            while self._running:
                _, running = self._running.popitem()
                running.stop(STOP_SECONDS)
        finally:
            kill_marked(self.mark)

    def leave_running(self) -> None:
        """Let the processes outlive the ``with`` block; they can be found by their mark."""
        self._left = True

    def _failure(self, name: str) -> ProcessFailed:
        """The error for a process that has ended, with the end of its log."""
        running = self._running[name]
        lines = [f"{name} {running.how_it_ended()}; see {running.log}", *running.last_lines()]
        if shutil.disk_usage(self.log_dir).free < FULL_DISK_BYTES:
            lines.append(f"the disk of {self.log_dir} is full")
        return ProcessFailed("\n".join(lines))


def port_is_free(port: int) -> bool:
    """Whether nothing listens on that port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
