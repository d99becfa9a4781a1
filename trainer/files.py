"""Writing files so that a reader, or a run that is resumed, never meets half a file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.files import replace_file
from services.contracts.errors import ConfigError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` when the disk is full or cannot be written to: such errors become a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror or error}") from error


def make_dir(path: Path) -> Path:
    """Create a folder and its parents; raises ConfigError when it cannot be written to."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed had begun to write in a folder; nobody may be writing there now.

    Raises:
        ConfigError: it cannot be removed.
    """
    with writing(folder):
        for path in folder.glob(".*.part"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step that survives a crash, for this user only: it may hold client data.

    Raises:
        ConfigError: it cannot be written.
    """
    content = text.encode()
    with writing(path):
        replace_file(path, content, mode=0o600)


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it is on disk; raises ConfigError when it cannot be written."""
    with writing(path), path.open("a", encoding="utf-8") as file:
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
