"""The Flower app bundle: what of this project goes to the SuperLink and on to every SuperNode.

Weights, data and the other packages come from the package that is installed there.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from services.common.files import replace_file
from services.contracts.errors import ConfigError


def stage_app(app: Path, target: Path) -> None:
    """Copy what goes into the bundle: Flower would walk through the whole project, with its virtual environment."""
    for folder in ("trainer", "trainer/strategies"):
        package = target / folder
        package.mkdir(parents=True)
        for module in (app / folder).glob("*.py"):
            shutil.copy(module, package)
    shutil.copy(app / "pyproject.toml", target)


def installed_versions() -> str:
    """What is installed beside the bundle: Fedward, and Flower as far as its own rule of compatibility goes."""
    major, minor, *_ = importlib.metadata.version("flwr").split(".")
    return f"fedward {importlib.metadata.version('fedward')}, flwr {major}.{minor}"


def deflated(bundle: Path) -> bytes:
    """A bundle's files, compressed: Flower stores them as they are, too large for a ConfigMap under `kubectl apply`."""
    content = BytesIO()
    with ZipFile(bundle) as stored, ZipFile(content, "w") as archive:
        for file in stored.infolist():
            archive.writestr(file, stored.read(file), ZIP_DEFLATED)
    return content.getvalue()


def build_bundle(app: Path, out: Path) -> None:
    """Write the bundle; the same sources always give the same bytes.

    Args:
        app: the folder with ``pyproject.toml`` and ``trainer/``.
        out: the file to write.

    Raises:
        ConfigError: Flower refuses the project, or the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        stage_app(app, Path(scratch) / "app")
        command = [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(Path(scratch) / "app")]
        quiet = {"FLWR_HOME": scratch, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        done = subprocess.run(command, cwd=scratch, env=os.environ | quiet, capture_output=True, text=True)
        bundles = list(Path(scratch).glob("*.fab"))
        if done.returncode != 0 or len(bundles) != 1:
            raise ConfigError(f"flwr build failed in {app}: {(done.stderr or done.stdout).strip()[:500]}")
        try:
            replace_file(out, deflated(bundles[0]))
        except OSError as error:
            raise ConfigError(f"cannot write to {out}: {error.strerror}") from error
