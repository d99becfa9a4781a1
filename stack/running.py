"""One process that was started: what it has written, whether and how it has ended, and how to stop it."""

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stack.marks import environment_with

LAST_LINES = 5
LINE_CHARACTERS = 500


@dataclass(frozen=True)
class Running:
    """A started process. Its output begins at ``log_start`` of the log, which may hold earlier attempts.

    ``serves`` says that it is to run until it is stopped, so that its end is a failure.
    """

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    serves: bool

    def output(self) -> str:
        """What the process has written so far."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def last_lines(self) -> list[str]:
        """The end of its output, without empty lines."""
        lines = [line[:LINE_CHARACTERS] for line in self.output().splitlines() if line.strip()]
        return lines[-LAST_LINES:]

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def ended_within(self, seconds: float) -> bool:
        """Wait for its end for at most so long; says whether it has ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def how_it_ended(self) -> str:
        """The exit code of a process that has ended, in words."""
        code = self.process.returncode
        if code >= 0:
            return f"ended with code {code}"
        cause = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        return f"was ended by signal {-code} ({signal.strsignal(-code)}){cause}"

    def stop(self, patience_seconds: float) -> None:
        """Ask it to end, and kill it when it does not."""
        self.process.terminate()
        if not self.ended_within(patience_seconds):
            self.process.kill()
            self.process.wait()


def start_process(argv: Sequence[str], log: Path, mark: str, *, serves: bool) -> Running:
    """Start a command in a session of its own, with its output at the end of ``log`` and the mark in its environment.

    Raises:
        OSError: the log cannot be written, or there is no such command.
    """
    with log.open("ab") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=child_environment() | environment_with(mark),
        )  # fmt: skip
    return Running(process, log, log_start, serves)


def child_environment() -> dict[str, str]:
    """The environment for child processes: one thread each, compiled bytecode kept, no network look-ups.

    Without bytecode every start pays several seconds of compilation. Unbuffered output keeps an error after what was
    printed before it.
    """
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**defaults, **env, "PYTHONUNBUFFERED": "1"}
