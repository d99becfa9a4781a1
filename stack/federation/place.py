"""A party's state folder: one command at a time works in it, and ends what one that was killed has left running."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.contracts.errors import ConfigError
from stack.marks import MARK, kill_marked


@contextmanager
def holding(state_dir: Path, mark: str) -> Iterator[None]:
    """Lock the folder for this command, whose processes carry ``mark``.

    Raises:
        ConfigError: another command works in it, or it cannot be written to.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot write to {state_dir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{state_dir} is in use by another command; stop that first") from error
        lock.seek(0)
        if MARK.fullmatch(left := lock.read()):
            kill_marked(left)
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        yield
