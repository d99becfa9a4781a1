"""``python -m gateway keys create|list|revoke``: the commands that edit the file of API keys."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gateway.api_keys import NAME, add_key, new_key, read_keys, revoke_key
from services.common.settings import exit_with
from services.contracts.errors import ConfigError, FedwardError

FILE_VARIABLE = "FEDWARD_GATEWAY_KEYS_FILE"


def main(argv: Sequence[str]) -> int:
    """``python -m gateway keys create|list|revoke``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.file is None:
        return exit_with(ConfigError(f"which keys file? give --file or set {FILE_VARIABLE}"))
    try:
        if arguments.command == "create":
            _create(arguments)
        elif arguments.command == "list":
            _list(arguments.file)
        else:
            entry = revoke_key(arguments.file, arguments.tenant, arguments.name)
            print(f"revoked: {entry.tenant}/{entry.name}")
    except FedwardError as error:
        return exit_with(error)
    except OSError as error:
        return exit_with(ConfigError(f"{arguments.file}: cannot write the API keys: {error.strerror}"))
    return 0


def _create(arguments: argparse.Namespace) -> None:
    expires = datetime.now(UTC) + timedelta(days=arguments.expires_days) if arguments.expires_days else None
    new = new_key(arguments.tenant, arguments.name, expires)
    add_key(arguments.file, new)
    print(new.secret)
    print("shown this once; it cannot be recovered from the file", file=sys.stderr)


def _list(path: Path) -> None:
    now = datetime.now(UTC)
    for key in read_keys(path).keys:
        until = f"  expires {key.expires:%Y-%m-%d}" if key.expires else ""
        print(f"{key.tenant}  {key.name}  {key.state(now)}  created {key.created:%Y-%m-%d}{until}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gateway keys",
        description="Make, list and revoke the API keys of the gateway. A running gateway takes changes up by itself.",
        epilog="example: python -m gateway keys create --file keys.json --tenant acme --name backend --expires-days 90",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    default = Path(os.environ[FILE_VARIABLE]) if FILE_VARIABLE in os.environ else None
    for command, summary in (
        ("create", "make a key and print it, once"),
        ("list", "print tenants, names and states"),
        ("revoke", "refuse a key from now on"),
    ):
        sub = commands.add_parser(command, help=summary, description=summary)
        sub.add_argument("--file", type=Path, default=default, help=f"keys file; default: ${FILE_VARIABLE}")
        if command != "list":
            sub.add_argument("--tenant", type=_name, required=True, help="whom the key belongs to")
            sub.add_argument("--name", type=_name, required=True, help="the key's name, unique for the tenant")
        if command == "create":
            sub.add_argument("--expires-days", type=_days, help="days until it expires; without it, it never does")
    return parser


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise argparse.ArgumentTypeError("letters, digits, '.', '_' and '-' only, at most 64, a letter or digit first")
    return text


def _days(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 36_500:
        raise argparse.ArgumentTypeError("a number of days, at least 1")
    return int(text)
