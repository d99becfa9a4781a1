"""Peers from PyPI and npm, at pinned versions, in environments of their own under a cache folder.

They are never dependencies of the project. An environment that is complete is used again; delete the folder to be rid
of it.
"""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import gateway
from gateway.bench.processes import PeerFailed

ROOT = Path(gateway.__file__).parents[1]
IMAGE_EXTRAS = ("gateway", "postgres", "tracing")  # as in the Dockerfile

LITELLM = "1.106.2"
PORTKEY = "1.15.2"
INSTALL_SECONDS = 1200.0
_COMPLETE = "complete"


def own_python(cache: Path) -> Path:
    """A Python with what our gateway's image holds and nothing else: libraries load what they find. Raises PeerFailed.

    The project itself is not installed there: what is measured is this checkout.
    """
    pins, project = ROOT / "constraints.txt", ROOT / "pyproject.toml"
    found = tomllib.loads(project.read_text())["project"]
    extras = found["optional-dependencies"]
    needs = [*found["dependencies"], *(package for extra in IMAGE_EXTRAS for package in extras[extra])]
    digest = hashlib.sha256(repr((needs, sys.version)).encode() + pins.read_bytes()).hexdigest()[:12]
    folder = cache / f"fedward-{digest}"
    _environment(folder, ["--constraint", str(pins), *needs])
    return folder / "bin/python"


def litellm(cache: Path) -> Path:
    """LiteLLM's command, installed where it is not yet (740 MB); raises PeerFailed."""
    folder = cache / f"litellm-{LITELLM}"
    _environment(folder, [f"litellm[proxy]=={LITELLM}"])
    return folder / "bin/litellm"


def portkey(cache: Path) -> Path:
    """Portkey's start script, installed where it is not yet (25 MB); raises PeerFailed."""
    folder = cache / f"portkey-{PORTKEY}"
    if not (folder / _COMPLETE).exists():
        npm = shutil.which("npm")
        if npm is None:
            raise PeerFailed("npm is not installed; it comes with Node.js")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        package = f"@portkey-ai/gateway@{PORTKEY}"
        _run([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", package])
        (folder / _COMPLETE).touch()
    return folder / "node_modules/@portkey-ai/gateway/build/start-server.js"


def node() -> str:
    """The Node.js command; raises PeerFailed."""
    found = shutil.which("node")
    if found is None:
        raise PeerFailed("node is not installed")
    return found


def node_version() -> str | None:
    """The version of Node.js; None where there is none."""
    found = shutil.which("node")
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout.strip() if found else None


def _environment(folder: Path, packages: Sequence[str]) -> None:
    if (folder / _COMPLETE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *packages])
    (folder / _COMPLETE).touch()


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(f"cannot install: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise PeerFailed(f"cannot install: {' '.join(command[1:4])} ended with {done.returncode}: {' '.join(last)}")
