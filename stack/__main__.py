"""Command line of the stack: ``python -m stack {demo,up,down,results}``."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from services.common.settings import exit_with
from services.contracts.errors import FedwardError
from stack.demo import run_demo
from stack.plan import DemoPlan
from stack.processes import interrupt_on_signals
from stack.results import run_all
from stack.up import down, up

EXAMPLES = """examples:
  python -m stack demo                                  # the main job, about ten minutes on two cores
  python -m stack demo --rounds 1 --clients 2 --samples-per-client 16 --limit 20 --out runs/quick
  python -m stack up --release runs/demo/release/...    # serve a released adapter on port 8080
  python -m stack down
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the error's class when it fails on purpose."""
    arguments = _parser().parse_args(argv)
    interrupt_on_signals()
    console = Console()
    try:
        arguments.run(arguments, console)
    except FedwardError as error:
        return exit_with(error)
    except KeyboardInterrupt:
        print("interrupted; every process was stopped", file=sys.stderr)
        return 130
    return 0


def _demo(arguments: argparse.Namespace, console: Console) -> None:
    chosen = {name: value for name, value in vars(arguments).items() if name in DemoPlan.__dataclass_fields__}
    run_demo(DemoPlan(**chosen), console, shlex.join(["python", "-m", "stack", *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m stack",
        description="The whole stack on this machine.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = os.environ.get("FEDWARD_DATA")

    demo = commands.add_parser("demo", help="the main job: train, evaluate, release, serve, stop")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    demo.add_argument("--split-seed", type=int, default=0, help="of AdvBench's split (default: 0)")
    demo.add_argument("--rounds", type=int, default=DemoPlan.rounds)
    demo.add_argument("--clients", type=int, default=DemoPlan.clients)
    demo.add_argument("--samples-per-client", type=int, default=DemoPlan.samples_per_client)
    demo.add_argument("--harmful-share", type=float, default=DemoPlan.harmful_share)
    demo.add_argument("--limit", type=int, help="ask only the first N prompts of each evaluation set")
    demo.add_argument(
        "--benchmarks", type=Path, default=data and Path(data), help="folder of benchmarks (default: $FEDWARD_DATA)"
    )
    demo.add_argument("--no-release", dest="release", action="store_false", help="end with the report")
    demo.set_defaults(run=_demo)

    results = commands.add_parser("results", help="demos over several seeds; prints mean and spread of every arm")
    results.add_argument("--out", type=Path, default=Path("runs/results"))
    results.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    results.add_argument("--split-seeds", type=int, nargs="+", default=[0, 1], help="split seeds (default: 0 1)")
    results.set_defaults(run=lambda a, console: run_all(a.out, a.seeds, a.split_seeds, a.demo_flags, console))
    results.add_argument("demo_flags", nargs="*", metavar="-- DEMO_FLAGS", help="further flags of `demo`, after --")

    upward = commands.add_parser("up", help="start the services and the gateway and leave them running")
    upward.add_argument("--out", type=Path, default=Path("runs/up"), help="folder of logs and process ids")
    upward.add_argument("--release", type=Path, help="adapter folder to serve; the base model without")
    upward.set_defaults(run=lambda arguments, console: up(arguments.out, arguments.release, console))

    downward = commands.add_parser("down", help="stop what `up` started")
    downward.add_argument("--out", type=Path, default=Path("runs/up"))
    downward.set_defaults(run=lambda arguments, console: down(arguments.out, console))
    return parser


if __name__ == "__main__":
    sys.exit(main())
