"""Writing files so that a reader, or a run that is resumed, never meets half a file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.contracts.errors import ConfigError


def make_dir(path: Path) -> Path:
    """Create a folder and its parents; raises ConfigError when it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}") from error
    return path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step that survives a crash."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it is on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Fill a hidden folder, then move it to ``target`` in one step; an older ``target`` is replaced.

    When the body fails, nothing is left of the hidden folder and ``target`` is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=".part"))
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        partial.chmod(0o755)  # mkdtemp makes it private; the inference service may run as another user
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
