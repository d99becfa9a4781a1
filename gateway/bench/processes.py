"""Processes that the benchmark starts, each in a process group of its own, and what they cost."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from services.contracts.errors import FedwardError

TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # what the kernel counts CPU time in; less than one cannot be told from none
END_SECONDS = 10.0


class PeerFailed(FedwardError):
    """A peer cannot be installed or started, or does not answer as it should."""

    code = "peer_failed"
    exit_code = 7


class Cores(NamedTuple):
    """Which core the gateways run on, and which the mock services and the load; None where there is only one."""

    gateways: int | None
    rest: int | None

    @classmethod
    def found(cls) -> "Cores":
        """The first two that this process may use."""
        if not hasattr(psutil.Process, "cpu_affinity"):
            return cls(None, None)
        cores = psutil.Process().cpu_affinity() or []
        return cls(cores[0], cores[1]) if len(cores) > 1 else cls(None, None)


def pin(pid: int, core: int | None) -> None:
    """Keep a process, and what it starts from now on, on one core."""
    if core is not None:
        psutil.Process(pid).cpu_affinity([core])


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path, core: int | None
) -> Iterator[psutil.Process]:
    """A process in a process group of its own, which is ended with all that it started, whatever happens.

    Args:
        command: what to run.
        environment: its variables besides PATH, HOME and LANG; it gets no others.
        folder: where it runs.
        log: where its output goes.
        core: where it is kept.

    Raises:
        PeerFailed: the command does not exist.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = None
    try:
        with log.open("wb") as output, _uninterrupted():
            process = subprocess.Popen(
                command,
                env=kept | dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        pin(process.pid, core)
        yield psutil.Process(process.pid)
    except FileNotFoundError as error:
        if process:
            raise
        raise PeerFailed(f"cannot start {command[0]}: {error.strerror}") from error
    finally:
        if process:
            end_group(process)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the block's end: a process must not start without being known to us."""
    waiting: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in waiting[:1]:
            signal.raise_signal(late)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process group: asked first, killed after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_SECONDS
        there = _signal(process.pid, number)
        while there and time.monotonic() < deadline:
            time.sleep(0.02)
            process.poll()  # a leader that has ended keeps its group alive until it is waited for
            there = _signal(process.pid, 0)
        if not there:
            break
    process.wait()


def _signal(group: int, number: int) -> bool:
    """Whether there is such a process group; 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and of all that it started, the ended ones too."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def rss_mb(process: psutil.Process) -> float:
    """Memory in use by a process and all that it started, in MB."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6
