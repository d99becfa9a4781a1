"""Coordinators that are killed (``SIGKILL``) at a chosen point of a round, as with their machine."""

import multiprocessing
import os
import pkgutil
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.fakes.trainer_runs import LocalGrid
from trainer.config import RunConfig
from trainer.server_app import train_federation

PATIENCE_SECONDS = 120.0
# Each run gets a process that was forked from one which has imported everything and started no thread.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "trainer.client_app", "trainer.constitutional"])


class Point(NamedTuple):
    """A run ends at the first call of ``function`` once ``finished`` rounds are on disk: before it, or ``after`` it."""

    function: str  # ``module:name``
    finished: int = 1
    after: bool = False


def run_until(point: Point, config: RunConfig) -> None:
    """Run a federation of in-process clients in a process of its own, which dies at the point."""
    process = FORKS.Process(target=_run, args=(point, config))
    process.start()
    process.join(PATIENCE_SECONDS)
    if process.exitcode != -signal.SIGKILL:
        process.kill()
        raise AssertionError(f"the run did not come to {point}; its process ended with {process.exitcode}")


def _run(point: Point, config: RunConfig) -> None:
    _set_mine(point, config)
    train_federation(LocalGrid(config, range(config.num_clients)), config)


def _set_mine(point: Point, config: RunConfig) -> None:
    """Replace the function by one that ends this process."""
    place, _, name = point.function.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(place)
    original: Callable[..., Any] = getattr(owner, name)
    rounds = config.run_dir / "rounds.jsonl"

    def mine(*arguments: Any, **named: Any) -> Any:
        finished = len(rounds.read_text().splitlines()) if rounds.exists() else 0
        if finished != point.finished:
            return original(*arguments, **named)
        if point.after:
            original(*arguments, **named)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, mine)
