"""Command line of a federation: ``python -m stack.federation {demo,coordinator,silo,register,train,...}``."""

import argparse
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from services.common.settings import exit_with
from services.contracts.errors import FedwardError
from stack.federation.bundles import serving_bundle, sign_bundle, signature_of
from stack.federation.coordinator import start_coordinator
from stack.federation.credentials import Credentials, make_credentials
from stack.federation.keeper import POLL_SECONDS, Keeper
from stack.federation.place import holding
from stack.federation.plan import FederationPlan
from stack.federation.run import run_federation
from stack.federation.settings import CoordinatorConfig, SiloConfig, read_config
from stack.federation.silo import start_silo
from stack.federation.train import register_silos, train
from stack.processes import Processes

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXAMPLES = """examples:
  python -m stack.federation demo                       # all parties on this machine, about three minutes
  python -m stack.federation keys --out certs --host coordinator.example.org --silo hospital-a --silo hospital-b
  python -m trainer bundle --out fedward.fab && python -m stack.federation sign fedward.fab --key certs/signer.key
  python -m stack.federation coordinator coordinator.toml           # stays up, on the coordinator's machine
  python -m stack.federation silo silo.toml                         # stays up, on a silo's machine
  python -m stack.federation register coordinator.toml              # once, beside the coordinator
  python -m stack.federation train coordinator.toml                 # one run to its end, beside the coordinator
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the error's class when it fails on purpose."""
    arguments = _parser().parse_args(argv)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    if getattr(arguments, "with_parent", False):
        _end_with_parent()
    try:
        arguments.run(arguments)
    except FedwardError as error:
        return exit_with(error)
    except OSError as error:
        return exit_with(FedwardError(f"{error.filename or 'federation'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        return 130
    return 0


def _stop(number: int, frame: object) -> None:
    """Unwind, so that everything that was started is stopped; a second signal does not disturb that."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _demo(arguments: argparse.Namespace) -> None:
    plan = FederationPlan(
        out=arguments.out, silos=arguments.silos, rounds=arguments.rounds, seed=arguments.seed, arm=arguments.arm,
        separated=arguments.namespaces,
    )  # fmt: skip
    run_federation(plan, Console(), shlex.join(["python", "-m", "stack.federation", *sys.argv[1:]]))


def _coordinator(arguments: argparse.Namespace) -> None:
    config = read_config(CoordinatorConfig, arguments.config)
    signature_of(config.bundle)  # must be there before anything is started
    with (
        serving_bundle(config.bundle) as hub,
        Processes(config.state_dir / "logs") as processes,
        holding(config.state_dir, processes.mark),
    ):
        keeper = start_coordinator(config, processes, hub, _say)
        _say(f"the coordinator is up; silos reach it at {config.fleet_bind}")
        _stay(keeper)


def _silo(arguments: argparse.Namespace) -> None:
    config = read_config(SiloConfig, arguments.config)
    with Processes(config.state_dir / "logs") as processes, holding(config.state_dir, processes.mark):
        keeper = start_silo(config, processes)
        _say(f"client {config.number} is up and connects to {config.superlink}")
        _stay(keeper)


def _register(arguments: argparse.Namespace) -> None:
    register_silos(read_config(CoordinatorConfig, arguments.config), _say)


def _train(arguments: argparse.Namespace) -> None:
    result = train(read_config(CoordinatorConfig, arguments.config), _say)
    _say(f"completed: {result['adapter']} (sha256 {result['adapter_sha256']})")


def _keys(arguments: argparse.Namespace) -> None:
    make_credentials(Credentials(arguments.out), arguments.host, arguments.silo)
    _say(f"keys and certificates are in {arguments.out}; give each silo its own key and keep signer.key apart")


def _sign(arguments: argparse.Namespace) -> None:
    _say(f"signature: {sign_bundle(arguments.bundle, arguments.key)}")


def _stay(keeper: Keeper) -> None:
    """Keep the processes running until a signal comes."""
    while True:
        keeper.tell(_say)
        time.sleep(POLL_SECONDS)


def _end_with_parent() -> None:
    """Have this process told to stop when the command that started it is gone, even if that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stack.federation",
        description="A federation of separate machines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a coordinator and its silos on this machine, a small federation, the end")
    demo.add_argument("--out", type=Path, default=Path("runs/federation"), help="run folder (runs/federation)")
    demo.add_argument("--silos", type=_positive, default=FederationPlan.silos)
    demo.add_argument("--rounds", type=_positive, default=FederationPlan.rounds)
    demo.add_argument("--seed", type=int, default=FederationPlan.seed)
    demo.add_argument("--arm", choices=("none", "filter"), default=FederationPlan.arm, help="the silos' curation")
    demo.add_argument(
        "--no-namespaces", dest="namespaces", action="store_false", help="all parties on this machine's loopback"
    )
    demo.set_defaults(run=_demo)

    parties: tuple[tuple[str, str, Callable[[argparse.Namespace], None]], ...] = (
        ("coordinator", "SuperLink, its proxy and a SuperExec, until it is stopped", _coordinator),
        ("silo", "safety service, SuperNode and a SuperExec, until it is stopped", _silo),
        ("register", "tell a coordinator that is up the silos' public keys", _register),
        ("train", "run one federation to its end, on a coordinator that is up", _train),
    )
    for name, text, function in parties:
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="TOML file, see stack/federation/settings.py")
        command.add_argument("--with-parent", action="store_true", help="end when the starting command is gone")
        command.set_defaults(run=function)

    keys = commands.add_parser("keys", help="make the keys and certificates of a federation")
    keys.add_argument("--out", type=Path, required=True)
    keys.add_argument("--host", action="append", required=True, help="a name or address of the coordinator")
    keys.add_argument("--silo", action="append", required=True, help="a silo's name")
    keys.set_defaults(run=_keys)

    sign = commands.add_parser("sign", help="sign an app bundle, so that SuperNodes run it")
    sign.add_argument("bundle", type=Path)
    sign.add_argument("--key", type=Path, required=True, help="Ed25519 private key in OpenSSH's format")
    sign.set_defaults(run=_sign)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
