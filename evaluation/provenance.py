"""Where a figure comes from: the code's commit, library versions, hardware and the exact command."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel

LIBRARIES = (
    "fedward", "httpx", "pydantic", "numpy", "scipy", "matplotlib", "torch", "transformers", "peft", "flwr"
)  # fmt: skip


class Hardware(BaseModel):
    """The machine of a run."""

    system: str
    cpu: str
    logical_cpus: int
    memory_gib: float | None
    gpus: list[str]


class Provenance(BaseModel):
    """What stands beside every figure; ``git_commit`` is None outside a git checkout."""

    command: str
    git_commit: str | None
    uncommitted_changes: bool | None
    python: str
    libraries: dict[str, str]
    hardware: Hardware


def collect(command: str | None = None) -> Provenance:
    """Describe this process; ``command`` replaces its own command line where another command started it."""
    status = _output("git", "status", "--porcelain")
    return Provenance(
        command=command or shlex.join(["python", "-m", "evaluation", *sys.argv[1:]]),
        git_commit=_output("git", "rev-parse", "HEAD"),
        uncommitted_changes=None if status is None else bool(status),
        python=platform.python_version(),
        libraries=_versions(),
        hardware=Hardware(
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            cpu=_cpu_name(),
            logical_cpus=os.cpu_count() or 1,
            memory_gib=_memory_gib(),
            gpus=(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
        ),
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # not part of this installation
            continue
    return found


def _output(program: str, *arguments: str) -> str | None:
    """A program's output, or None when it is missing, slow or fails."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    return round(pages / 2**30, 1)
