"""Keep processes running, as a cluster would: what ends is started again after a pause."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stack.processes import Processes, ProcessFailed

PAUSE_SECONDS = 5.0
STABLE_SECONDS = 15.0  # what ran for so long had started well
POLL_SECONDS = 0.3


@dataclass
class Kept:
    """One command that is kept running. ``ended`` is when it ended last, ``failing`` since when it does not start."""

    argv: Sequence[str]
    patience_seconds: float
    advice: str
    process: subprocess.Popen[bytes]
    started: float
    ended: float | None = None
    failing: float | None = None


class Keeper:
    """Starts commands and starts them again whenever they end."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._kept: dict[str, Kept] = {}

    def keep(self, name: str, argv: Sequence[str], *, patience_seconds: float = 60.0, advice: str = "") -> None:
        """Start a command.

        Args:
            name: what it is called in messages and logs.
            argv: the command.
            patience_seconds: for so long it may fail to start before ``look`` gives up.
            advice: what the reader of that error should check.
        """
        process = self._processes.start(name, argv)
        self._kept[name] = Kept(argv, patience_seconds, advice, process, time.monotonic())

    def look(self) -> list[str]:
        """Start what has ended again; returns a line for each event.

        Raises:
            ProcessFailed: a command has failed to start for longer than its patience.
        """
        events = []
        now = time.monotonic()
        for name, kept in self._kept.items():
            if kept.process.poll() is None:
                if now - kept.started > STABLE_SECONDS:
                    kept.failing = None
            elif kept.ended is None:
                kept.ended = now
                if now - kept.started < STABLE_SECONDS:
                    kept.failing = kept.failing or now
                if kept.failing and now - kept.failing > kept.patience_seconds:
                    raise ProcessFailed(
                        f"{name} does not start (code {kept.process.returncode}); see "
                        f"{self._processes.log_dir / name}.log{'. ' if kept.advice else ''}{kept.advice}"
                    )
                events.append(f"{name} ended with code {kept.process.returncode}; it is started again")
            elif now - kept.ended > PAUSE_SECONDS:
                kept.process, kept.started, kept.ended = self._processes.start(name, kept.argv), now, None
        return events
