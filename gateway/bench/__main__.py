"""``python -m gateway.bench``: our gateway beside its peers on the same mock model and mock classifier.

All gateways stay up; load goes to one after the other, in rounds, and the order turns with every round: a machine's
speed drifts, the ratio of neighbours does not. Then every gateway takes the leak test and the fault test.
"""

import argparse
import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from gateway.bench.fault import faults
from gateway.bench.gateways import Gateway, running_gateway
from gateway.bench.leak import leaks
from gateway.bench.load import WORKS, Cell, measure
from gateway.bench.peers import LAUNCHES
from gateway.bench.processes import Cores, PeerFailed, pin, rss_mb
from gateway.bench.report import OURS, goals, guarded, provenance, streams
from gateway.bench.services import MockServices, mock_services
from gateway.bench.tables import tables
from services.common.benchmarks import write_figures
from services.common.settings import exit_with
from services.contracts.errors import FedwardError

CACHE = Path.home() / ".cache/fedward-bench"
PROGRAM = "python -m gateway.bench"


def main(argv: Sequence[str]) -> int:
    """Measure, print the tables and write the JSON; returns the exit code."""
    options = read_options(argv)
    for number in (signal.SIGTERM, signal.SIGINT):  # by default the first would leave the gateways behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        summary = run(options) | {"command": shlex.join([*PROGRAM.split(), *argv])}
        print(tables(summary))
        write_figures(options.out, summary)
    except FedwardError as error:
        return exit_with(error)
    return 0


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default=",".join(LAUNCHES), help=f"which ones (default: {','.join(LAUNCHES)})")
    parser.add_argument("--rounds", type=int, default=3, help="how often every load is measured (default: 3)")
    parser.add_argument("--requests", type=int, default=300, help="most requests of one measurement (default: 300)")
    parser.add_argument("--seconds", type=float, default=15.0, help="longest measurement (default: 15)")
    parser.add_argument("--patience", type=float, default=10.0, help="fault test: how long a client waits (10)")
    parser.add_argument("--quick", action="store_true", help="one round of few requests: does it run?")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where peers are installed (default: {CACHE})")
    parser.add_argument(
        "--python", type=Path, help="runs fedward and fastapi_httpx (default: one with nothing else, in --cache)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gateway.json"), help="where the figures go")
    parser.add_argument("flags", nargs="*", help="after --, further flags of our gateway")
    options = parser.parse_args(argv)
    options.peers = options.peers.split(",")
    if unknown := [name for name in options.peers if name not in LAUNCHES]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(LAUNCHES)}")
    if options.quick:
        options.rounds, options.requests, options.patience = 1, 20, 2.0
    if min(options.rounds, options.requests, options.seconds, options.patience) <= 0:
        parser.error("--rounds, --requests, --seconds and --patience are above 0")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start everything, measure, and stop everything."""
    console, cores = Console(stderr=True), Cores(None, None) if options.quick else Cores.found()
    folder = options.out.with_suffix("").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = provenance()
    pin(os.getpid(), cores.rest)
    with ExitStack() as exits:
        services = exits.enter_context(mock_services(cores.rest))
        gateways: dict[str, Gateway] = {}
        failed: dict[str, str] = {}
        in_python = {"python": options.python and options.python.absolute()}  # resolved, it would leave its environment
        further = {OURS: in_python | {"flags": options.flags}, "fastapi_httpx": in_python}
        for name in options.peers:
            console.print(f"starting {name}")
            launch = partial(LAUNCHES[name], services, options.cache.absolute(), folder, **further.get(name, {}))
            try:
                gateways[name] = exits.enter_context(running_gateway(name, launch, services, folder, cores.gateways))
            except PeerFailed as error:
                failed[name] = error.message
                console.print(f"{name} failed: {error.message}")
        cells = measure_all(list(gateways.values()), services, options, console)
        found |= {
            "peers": {name: _start_and_memory(one) for name, one in gateways.items()}
            | {name: {"failed": reason} for name, reason in failed.items()},
            "guarded": guarded(cells, list(gateways)),
            "stream": streams(cells, list(gateways)),
            "leak": {},
            "fault": {},
            "measurements": [cell.as_dict() for cell in cells],
        }
        for name, one in track(list(gateways.items()), "leaks and faults", console=console):
            found["leak"][name] = asyncio.run(leaks(one, services, quick=options.quick))
            found["fault"][name] = asyncio.run(faults(one, services, options.patience, quick=options.quick))
    return found | {"goals": goals(found)}


def measure_all(
    gateways: Sequence[Gateway], services: MockServices, options: argparse.Namespace, console: Console
) -> list[Cell]:
    """Every work on every gateway in every round; the order turns with the round."""
    plan = [
        (number, work, gateway)
        for number in range(options.rounds)
        for work in WORKS
        for gateway in (gateways if number % 2 == 0 else reversed(gateways))
    ]
    cells = []
    for number, work, gateway in track(plan, "measuring", console=console):
        services.follow(work.script)
        cells.append(asyncio.run(measure(gateway, work, number, options.requests, options.seconds)))
    return cells


def _start_and_memory(gateway: Gateway) -> dict[str, float]:
    return {
        "start_seconds": round(gateway.start_seconds, 2),
        "start_cpu_seconds": round(gateway.start_cpu_seconds, 2),
        "start_rss_mb": round(gateway.start_rss_mb, 1),
        "rss_mb": round(rss_mb(gateway.process), 1),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
