"""The mock services as the benchmark sees them: a process, its ports, and a port to set the script."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from gateway.bench.processes import END_SECONDS, pin
from gateway.bench.script import Counters, Script


class MockServices:
    """Running mock services."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.upstream_url = f"http://127.0.0.1:{ports['upstream']}"
        self.classifier_url = f"http://127.0.0.1:{ports['classifier']}"
        self._control = f"http://127.0.0.1:{ports['control']}/script"

    def follow(self, script: Script) -> None:
        """Behave so from now on; counters start at zero."""
        httpx.post(self._control, content=script.model_dump_json(), trust_env=False).raise_for_status()

    def counters(self) -> Counters:
        """What happened since."""
        return Counters.model_validate_json(httpx.get(self._control, trust_env=False).raise_for_status().content)


@contextmanager
def mock_services(core: int | None) -> Iterator[MockServices]:
    """Both mock services in one process of their own; they end with the block, or when this process does."""
    command = [sys.executable, "-m", "gateway.bench.mock"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        try:
            pin(process.pid, core)
            assert process.stdout is not None
            yield MockServices(json.loads(process.stdout.readline()))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
