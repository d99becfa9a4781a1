"""A file that may change while the gateway runs: read again when it has changed, never exchanged for a broken one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from services.common.logs import get_logger
from services.contracts.errors import ConfigError

T = TypeVar("T")
Stamp = tuple[int, int, int]


class WatchedFile(Generic[T]):
    """What a file says at present.

    A change that cannot be read leaves the last good content in force, is logged, and stands in ``problem``, which
    belongs into the readiness answer: the operator hears of a slip of the pen without all clients being locked out.

    Args:
        path: the file.
        read: reads it; raises ConfigError when it cannot.
        look_seconds: how often the file is looked at, at most; a look costs one ``stat``.

    Raises:
        ConfigError: it cannot be read the first time.
    """

    def __init__(self, path: Path, read: Callable[[Path], T], *, look_seconds: float = 1.0) -> None:
        self._path = path
        self._read = read
        self._look_seconds = look_seconds
        # The stamp is taken before reading: a change in between is then seen as one at the next look.
        self._stamp = self._look()
        self._value = read(path)
        self._looked_at = time.monotonic()
        self.problem: str | None = None

    def current(self) -> T:
        """The content of the last version that could be read."""
        now = time.monotonic()
        if now - self._looked_at >= self._look_seconds:
            self._looked_at = now
            if (stamp := self._look()) != self._stamp:
                self._stamp = stamp
                self._reload()
        return self._value

    def _reload(self) -> None:
        try:
            self._value = self._read(self._path)
        except ConfigError as error:
            self.problem = f"{error.message}; the version before it stays in force"
            get_logger().error("file not reloaded", path=str(self._path), error=error.message)
        else:
            self.problem = None
            get_logger().info("file reloaded", path=str(self._path))

    def _look(self) -> Stamp | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
