"""A real Redis in a temporary folder, on a Unix socket; a test that needs it is skipped where there is none."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

REDIS = shutil.which("redis-server")


class RedisServer:
    """Redis as a child process that can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis+unix://{self._socket}"

    def start(self) -> None:
        if REDIS is None:
            pytest.skip("redis-server is not installed: the counters' Redis cannot be tested")
        options = {"port": "0", "unixsocket": str(self._socket), "save": "", "appendonly": "no"}
        command = [REDIS, *(part for name, value in options.items() for part in (f"--{name}", value))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self._socket.parent)
        for _ in range(1000):
            if self._socket.exists():
                return
            assert self._process.poll() is None, "redis-server did not start"
            time.sleep(0.005)
        raise AssertionError("redis-server did not open its socket")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None
            self._socket.unlink(missing_ok=True)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
