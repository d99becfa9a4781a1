"""Work that is killed (``SIGKILL``) at a chosen point, as with its machine: nothing is cleaned up."""

import multiprocessing
import os
import pkgutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE_SECONDS = 120.0
# Each time a process that was forked from one which has imported everything and started no thread.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "tests.fakes.trainer_runs", "trainer.constitutional", "trainer.release"])


class Point(NamedTuple):
    """The first call of ``function`` once ``finished`` rounds are on disk: the end comes before it, or ``after`` it."""

    function: str  # ``module:name``
    finished: int = 1
    after: bool = False


def run_until(point: Point, work: Callable[..., object], *arguments: object, rounds: Path | None = None) -> None:
    """Do the work in a process of its own, which dies at the point; ``rounds`` is the file of finished rounds."""
    process = FORKS.Process(target=_run, args=(point, rounds, work, *arguments))
    process.start()
    process.join(PATIENCE_SECONDS)
    if process.exitcode != -signal.SIGKILL:
        process.kill()
        raise AssertionError(f"the work did not come to {point}; its process ended with {process.exitcode}")


def _run(point: Point, rounds: Path | None, work: Callable[..., object], *arguments: object) -> None:
    _set_mine(point, rounds)
    work(*arguments)


def _set_mine(point: Point, rounds: Path | None) -> None:
    """Replace the function by one that ends this process."""
    place, _, name = point.function.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(place)
    original: Callable[..., Any] = getattr(owner, name)

    def mine(*arguments: Any, **named: Any) -> Any:
        finished = len(rounds.read_text().splitlines()) if rounds and rounds.exists() else 0
        if finished != point.finished:
            return original(*arguments, **named)
        if point.after:
            original(*arguments, **named)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, mine)
