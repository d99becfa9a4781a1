"""Marks: everything that a command starts carries the command's mark in its environment, however deep it lies.

Neither process ids nor process groups would do: an id may be given to another process, Flower's processes have
sessions of their own, and what a killed process leaves behind has no parent that leads to it.
"""

import os
import re
import time
import uuid
from contextlib import suppress

import psutil

VARIABLE = "FEDWARD_STARTED_BY"
MARK = re.compile("[0-9a-f]{32}")
KILL_SECONDS = 10.0


def new_mark() -> str:
    """A mark that nothing carries yet."""
    return uuid.uuid4().hex


def environment_with(mark: str) -> dict[str, str]:
    """The variable for what carries ``mark``; a mark that this process carries itself is kept."""
    outer = os.environ.get(VARIABLE)
    return {VARIABLE: f"{outer}:{mark}" if outer else mark}


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry a mark, last started first; raises ValueError for what is no mark."""
    if not MARK.fullmatch(mark):
        raise ValueError(f"not a mark: {mark!r}")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if mark in process.environ().get(VARIABLE, "").split(":"):
                found.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def end(process: psutil.Process, patience_seconds: float) -> None:
    """Ask a process to end and wait for it, but not for whoever has to collect its exit code."""
    deadline = time.monotonic() + patience_seconds
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)


def kill_marked(mark: str) -> None:
    """Kill whatever carries a mark, also what these processes start meanwhile."""
    deadline = time.monotonic() + KILL_SECONDS
    while (found := marked(mark)) and time.monotonic() < deadline:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)  # what has died is no longer found, even if nobody has waited for it yet
