"""Keep processes running, as a cluster would: what ends is started again after a pause."""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stack.processes import Processes, ProcessFailed

PAUSE_SECONDS = 5.0
STABLE_SECONDS = 15.0  # what ran for so long had started well
POLL_SECONDS = 0.3
END_SECONDS = 10.0
CHECK_SECONDS = 5.0  # between looks at what a process wrote


@dataclass
class Kept:
    """One command that is kept running.

    ``ended`` is when it ended last, ``failing`` since when it does not start, ``told`` what was last said to be wrong
    with it.
    """

    argv: Sequence[str]
    patience_seconds: float
    explain: Callable[[str], str]
    stuck: Callable[[str], bool]
    process: subprocess.Popen[bytes]
    started: float
    ended: float | None = None
    failing: float | None = None
    checked: float = 0.0
    told: str = ""


class Keeper:
    """Starts commands and starts them again whenever they end."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._kept: dict[str, Kept] = {}

    def keep(
        self,
        name: str,
        argv: Sequence[str],
        *,
        patience_seconds: float = 60.0,
        explain: Callable[[str], str] = lambda output: "",
        stuck: Callable[[str], bool] = lambda output: False,
    ) -> None:
        """Start a command.

        Args:
            name: what it is called in messages and logs.
            argv: the command.
            patience_seconds: for so long it may fail to start before ``look`` gives up.
            explain: what is wrong with it, in words, from what it wrote; empty when that is not known.
            stuck: whether it hangs, by what it wrote; it is then ended, and started again.
        """
        process = self._processes.start(name, argv)
        self._kept[name] = Kept(argv, patience_seconds, explain, stuck, process, time.monotonic())

    def tell(self, say: Callable[[str], None]) -> None:
        """``look``, and say what it found."""
        for event in self.look():
            say(event)

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
                if now - max(kept.checked, kept.started) >= CHECK_SECONDS:
                    kept.checked = now
                    output = self._processes.output(name)
                    if kept.stuck(output):
                        _end(kept.process)
                        events.append(self._ended(name, "hung, and was ended", output))
                    elif (why := kept.explain(output)) and why != kept.told:
                        kept.told = why
                        events.append(f"{name}: {why}")
            elif kept.ended is None:
                how = f"ended with code {kept.process.returncode}"
                events.append(self._ended(name, how, self._processes.output(name)))
            elif now - kept.ended > PAUSE_SECONDS:
                kept.process, kept.started, kept.ended = self._processes.start(name, kept.argv), now, None
                kept.told = ""
        return events

    def _ended(self, name: str, how: str, output: str) -> str:
        """Note an end, to be followed by a new start; returns the line on it, or raises ProcessFailed."""
        kept, now = self._kept[name], time.monotonic()
        kept.ended = now
        if now - kept.started < STABLE_SECONDS:
            kept.failing = kept.failing or now
        event = f"{name} {how}"
        if why := kept.explain(output):
            event = f"{event}: {why}"
        if kept.failing and now - kept.failing > kept.patience_seconds:
            log = self._processes.log_dir / f"{name}.log"
            raise ProcessFailed(f"{event}; it has not started for {kept.patience_seconds:.0f} s, see {log}")
        return f"{event}; it is started again"


def first_reason(reasons: Sequence[tuple[str, str]], output: str) -> str:
    """What is wrong with a process, from what it wrote: the first reason whose pattern is in it, or nothing."""
    return next((reason for pattern, reason in reasons if re.search(pattern, output, re.DOTALL)), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
