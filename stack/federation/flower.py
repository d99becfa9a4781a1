"""Flower's commands, each with a home of its own and nothing that reaches out to the internet."""

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
CONNECTION = "coordinator"  # what `flwr` calls our SuperLink


def flower(command: str, home: Path, *flags: str | Path | int, **environment: str) -> list[str]:
    """The command line of one of Flower's programs.

    Args:
        command: its name; it lies beside our Python.
        home: the folder for what it keeps (``FLWR_HOME``); two programs must not share one.
        flags: its arguments.
        environment: further variables.
    """
    home.mkdir(parents=True, exist_ok=True)
    variables = {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # a SuperExec looks for its programs there
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        **environment,
    }
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *assignments, str(BIN / command), *map(str, flags)]


def write_connection(home: Path, address: str, authority: Path) -> None:
    """Tell the command ``flwr`` with that home where the SuperLink is."""
    home.mkdir(parents=True, exist_ok=True)
    lines = [
        "[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]",
        f'address = "{address}"', f'root-certificates = "{authority.resolve()}"',
    ]  # fmt: skip
    (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
