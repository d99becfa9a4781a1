"""Files that may change while the gateway runs: read again when they have changed, never exchanged for broken ones."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from services.common.logs import get_logger
from services.contracts.errors import ConfigError

LOOK_SECONDS = 1.0

T = TypeVar("T")
Stamp = tuple[int, int, int, int] | None


class WatchedFile(Generic[T]):
    """What a file says; a new version that is wrong leaves the one before in force, and ``problem`` says why.

    ``current`` is swapped in one step. Take it once per request, so that one request has one version from end to end.

    Args:
        path: the file.
        read: reads it; raises ConfigError when it is wrong.

    Raises:
        ConfigError: the file is wrong at the start, when there is nothing to fall back on.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path = path
        self._read = read
        # The stamp is taken before reading: a change in between is then seen as one at the next look.
        self._tried = self._changed = self._stamp()
        self.current = read(path)
        self.problem: str | None = None  # why the newest version is not in force; None when it is

    def look(self) -> None:
        """Read the file if it has changed and then stayed the same from one look to the next.

        Who writes in place would otherwise be read half-way; half a file can be valid, with its last tenants missing.
        """
        stamp = self._stamp()
        settled, self._changed = stamp == self._changed, stamp
        if settled and stamp != self._tried:
            self._tried = stamp
            self._reload()

    def _reload(self) -> None:
        try:
            self.current = self._read(self._path)
        except Exception as error:  # whatever a parser may raise: the watch over this file and the others goes on
            told = error.message if isinstance(error, ConfigError) else f"{self._path}: {type(error).__name__}"
            self.problem = told
            get_logger().error("new file refused, the one before it stays in force", error=told)
        else:
            self.problem = None
            get_logger().info("new file in force", path=str(self._path))

    def _stamp(self) -> Stamp:
        """What changes with the file, also when a symbolic link on the way to it does, as a ConfigMap's ``..data``."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@asynccontextmanager
async def watching(files: Sequence[WatchedFile[Any]]) -> AsyncIterator[None]:
    """Look at the files every ``LOOK_SECONDS`` for as long as the block runs."""
    task = asyncio.create_task(_watch(files))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(files: Sequence[WatchedFile[Any]]) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for file in files:
            await asyncio.to_thread(file.look)
