"""What benchmarks share: a service in a process of its own, turns, spreads, provenance, and the file of figures."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from services.common.files import replace_file
from services.common.ports import free_port
from services.contracts.errors import ConfigError

Figures = TypeVar("Figures")


class Running(NamedTuple):
    """A service that was started to be measured."""

    url: str
    pid: int
    ready_seconds: float


@contextmanager
def running_service(
    module: str, flags: Sequence[str], log: Path, *, patience_seconds: float, environment: Mapping[str, str]
) -> Iterator[Running]:
    """A service in a process of its own, as users start it; it is ended whatever happens.

    Args:
        module: what ``python -m`` starts.
        flags: of its command line.
        log: where its output goes.
        patience_seconds: how long it may take to get ready.
        environment: variables beside this process's own.

    Raises:
        ConfigError: it ends at start, or is not ready in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", module, "--port", str(port), "--log-level", "warning", *flags]
    variables, began = {**os.environ, **environment}, time.perf_counter()
    with log.open("wb") as output, subprocess.Popen(command, env=variables, stdout=output, stderr=output) as process:
        try:
            while not _is_ready(url):
                if process.poll() is not None or time.perf_counter() - began > patience_seconds:
                    raise ConfigError(f"{module} does not get ready; its output is in {log}")
                time.sleep(0.02)
            yield Running(url, process.pid, time.perf_counter() - began)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").is_success
    except httpx.TransportError:
        return False


def in_turns(ways: Sequence[str], rounds: int, measure: Callable[[str, int], Figures]) -> dict[str, list[Figures]]:
    """Measure every way in every round, each round beginning with another way, since a machine's speed drifts.

    Args:
        ways: what is compared.
        rounds: those that count; round 0 comes before them and does not, for it sets up what first use needs.
        measure: one measurement, of a way in a round.

    Returns:
        For each way what was measured, a value for each round that counts.
    """
    found: dict[str, list[Figures]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for place in range(len(ways)):
            way = ways[(place + number) % len(ways)]
            figures = measure(way, number)
            if number:
                found[way].append(figures)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def provenance(libraries: Sequence[str], seeds: Mapping[str, int]) -> dict[str, Any]:
    """Where figures come from: commit, versions of Python and the libraries, hardware, seeds."""
    return {
        "schema_version": 1,
        "git_commit": code_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "hardware": {
            "machine": platform.platform(),
            "logical_cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": os.getloadavg(),
        },
        "seeds": dict(seeds),
    }


def code_commit() -> str | None:
    """The commit of the code that runs; None outside a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_figures(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a benchmark's figures as JSON; raises ConfigError when that cannot be done."""
    try:
        replace_file(path, (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the figures: {error.strerror}") from error
