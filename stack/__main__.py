"""Command line of the stack: ``python -m stack {demo,up,down,results,hostile}``."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from services.common.settings import exit_with
from services.contracts.errors import FedwardError
from stack.demo import run_demo
from stack.hostile import plan_seeds, report, run_hostile
from stack.plan import DemoPlan
from stack.results import run_all
from stack.up import down, up

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXAMPLES = """examples:
  python -m stack demo                                  # the main job, about seven minutes on two cores
  python -m stack demo --rounds 1 --clients 2 --samples-per-client 16 --limit 50 --out runs/quick
  python -m stack up --release runs/demo/release/release-filter+cai-round-3      # serve what the demo released
  python -m stack down
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the error's class when it fails on purpose."""
    arguments = _parser().parse_args(argv)
    _stop_on_signals()
    _reach_this_machine_directly()
    try:
        arguments.run(arguments, Console())
    except FedwardError as error:
        return exit_with(error)
    except OSError as error:
        return exit_with(FedwardError(f"{error.filename or arguments.out}: {error.strerror or error}"))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _stop_on_signals() -> None:
    """Make SIGTERM and a closed terminal end the program as Ctrl-C does, so that ``with`` blocks clean up.

    A second signal does not disturb the clean-up. A signal that is ignored on purpose (``nohup``) stays ignored.
    """

    def stop(number: int, frame: object) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        print("stopping every process that was started ...", file=sys.stderr)
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _reach_this_machine_directly() -> None:
    """Keep an HTTP proxy out of calls to 127.0.0.1, here and in everything that is started."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))


def _plan(arguments: argparse.Namespace) -> DemoPlan:
    return DemoPlan(**{name: value for name, value in vars(arguments).items() if name in DemoPlan.__dataclass_fields__})


def _demo(arguments: argparse.Namespace, console: Console) -> None:
    run_demo(_plan(arguments), console, _command())


def _results(arguments: argparse.Namespace, console: Console) -> None:
    flags = arguments.demo_flags
    size = _plan(_parser().parse_args(["demo", "--no-release", *flags]))
    run_all(arguments.out, size, arguments.seeds, arguments.split_seeds, flags, console)


def _hostile(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.report:
        report(arguments.out, plan_seeds(arguments.out, _plan(arguments), arguments.seeds), console, _command())
    else:
        run_hostile(arguments.out, _plan(arguments), arguments.seeds, console, _command())


def _command() -> str:
    return shlex.join(["python", "-m", "stack", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m stack",
        description="The whole stack on this machine.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the main job: train, evaluate, release, serve, stop")
    _add_demo_flags(demo)
    demo.set_defaults(run=_demo)

    results = commands.add_parser("results", help="demos over several seeds; prints mean and spread of every arm")
    results.add_argument("--out", type=Path, default=Path("runs/results"))
    results.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    results.add_argument("--split-seeds", type=int, nargs="+", default=[0, 1], help="split seeds (default: 0 1)")
    results.add_argument("demo_flags", nargs="*", metavar="-- DEMO_FLAGS", help="further flags of `demo`, after --")
    results.set_defaults(run=_results)

    hostile = commands.add_parser("hostile", help="federations with malicious clients, with and without defences")
    hostile.add_argument("--out", type=Path, default=Path("runs/hostile"), help="folder (default: runs/hostile)")
    hostile.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    hostile.add_argument("--rounds", type=_positive, default=3)
    hostile.add_argument("--samples-per-client", type=_positive, default=24)
    hostile.add_argument("--limit", type=_positive, default=80, help="prompts of each evaluation set (default: 80)")
    hostile.add_argument("--report", action="store_true", help="only write the report, on what is finished")
    _add_benchmarks_flag(hostile)
    hostile.set_defaults(run=_hostile, clients=10, release=False)

    upward = commands.add_parser("up", help="start the services and the gateway and leave them running")
    upward.add_argument("--out", type=Path, default=Path("runs/up"), help="folder of logs (default: runs/up)")
    upward.add_argument("--release", type=Path, help="adapter folder to serve; the base model without")
    upward.set_defaults(run=lambda arguments, console: up(arguments.out, arguments.release, console))

    downward = commands.add_parser("down", help="stop what `up` started")
    downward.add_argument("--out", type=Path, default=Path("runs/up"), help="the folder given to `up`")
    downward.set_defaults(run=lambda arguments, console: down(arguments.out, console))
    return parser


def _add_demo_flags(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    demo.add_argument("--split-seed", type=int, default=0, help="of AdvBench's split (default: 0)")
    demo.add_argument("--rounds", type=_positive, default=DemoPlan.rounds)
    demo.add_argument("--clients", type=_positive, default=DemoPlan.clients)
    demo.add_argument("--samples-per-client", type=_positive, default=DemoPlan.samples_per_client)
    demo.add_argument("--harmful-share", type=_share, default=DemoPlan.harmful_share)
    demo.add_argument("--limit", type=_positive, help="ask only the first N prompts of each evaluation set")
    _add_benchmarks_flag(demo)
    demo.add_argument("--no-release", dest="release", action="store_false", help="end with the report")


def _add_benchmarks_flag(command: argparse.ArgumentParser) -> None:
    data = os.environ.get("FEDWARD_DATA")
    command.add_argument(
        "--benchmarks", type=Path, default=data and Path(data), help="folder of benchmarks (default: $FEDWARD_DATA)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
