"""What a client's process costs by phase, from its start to its end: Flower starts one for each message.

``plain`` is the same process with ordinary imports, that is, with the garbage collector on meanwhile and nothing
frozen; ``query`` is one whose message asks for no training.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.common.benchmarks import in_turns, spread
from services.contracts.errors import ConfigError
from trainer.bench.visits import SHAPES, prepare

WAYS = ("ours", "plain", "query")
WALL = "wall time"


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way, with spreads over the rounds; ways take turns."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(SHAPES[0], Path(folder))
        (Path(folder) / "config.json").write_text(config.model_dump_json(by_alias=True))
        found = in_turns(WAYS, rounds, lambda way, _: run_apart(way, Path(folder)))
    for way, ones in found.items():
        figures = {key: spread([one[key] for one in ones]) for key in ones[0]}
        wall = figures.pop(WALL)
        print(f"client process, {way:<6} {figures['all']['median']:.2f} CPU s, {wall['median']:.1f} s")
        yield {"way": way, "processes": rounds, "cpu_seconds": figures, "seconds": wall}


def run_apart(way: str, folder: Path) -> dict[str, float]:
    """CPU seconds of one process by phase, of all of it, and its wall time; raises ConfigError when it fails."""
    command = [sys.executable, "-m", "trainer.bench.client_process", way, str(folder)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ConfigError(f"the client process failed with exit code {process.returncode}; its reason is above")
    report = json.loads(output.splitlines()[-1])
    phases: dict[str, float] = report["phases"]
    phases["end of the process"] = usage.ru_utime + usage.ru_stime - report["at_end"]
    return phases | {"all": sum(phases.values()), WALL: time.perf_counter() - began}
