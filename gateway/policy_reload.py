"""The policy in force, read again whenever its file changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from gateway.policy_file import PolicySet, read_policies
from services.common.logs import get_logger
from services.contracts.errors import ConfigError

LOOK_SECONDS = 1.0

Stamp = tuple[int, int, int, int] | None


class PolicyInForce:
    """Holds the policies of one file; a new file that is wrong leaves them as they are.

    ``current`` is swapped in one step. Take it once per request, so that one request has one policy from end to end.

    Raises:
        ConfigError: the file is wrong at the start, when there is nothing to fall back on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tried = self._changed = self._stamp()
        self.current: PolicySet = read_policies(path)
        self.error: str | None = None  # why the newest file is not in force; None when it is

    def look(self) -> None:
        """Read the file if it has changed and then stayed the same from one look to the next.

        Who writes in place would otherwise be read half-way; half a file can be valid, with its last tenants missing.
        """
        stamp = self._stamp()
        settled, self._changed = stamp == self._changed, stamp
        if settled and stamp != self._tried:
            self._tried = stamp
            self._read()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look at the file every ``LOOK_SECONDS`` for as long as the block runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.look)

    def _read(self) -> None:
        try:
            policies = read_policies(self._path)
        except ConfigError as error:
            self.error = error.message
            get_logger().error("new policy refused, the old one stays in force", error=error.message)
        else:
            self.current, self.error = policies, None
            get_logger().info("new policy in force", policy_sha256=policies.sha256)

    def _stamp(self) -> Stamp:
        """What changes with the file, also when a symbolic link on the way to it does, as a ConfigMap's ``..data``."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
