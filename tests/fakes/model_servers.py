"""The two model services on real sockets, served from this process with tiny models."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn

from services.inference.app import build_app
from services.inference.model import load_base
from services.inference.service import InferenceService
from services.inference.settings import InferenceSettings

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI app by uvicorn in a thread, to a graceful end; gives its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended at start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@contextmanager
def serving_inference(model: Path, *, failing: bool = False, **settings: Any) -> Iterator[str]:
    """The inference service with the model at ``model``, which may fail on its third step; gives its URL."""
    wanted = InferenceSettings(model=str(model), **settings)
    base = load_base(wanted)
    if failing:
        network: Any = Failing(base.network)
        base = replace(base, network=network)
    with serving(build_app(InferenceService(base, wanted))) as url:
        yield url


class Failing(torch.nn.Module):
    """A network that fails on its third step, as one does that runs out of memory."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.device = network.device
        self.steps = 0

    def forward(self, **inputs: Any) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of memory")
        return self.network(**inputs)


def start_inference(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """The inference service as a process of its own, with the tiny model of ``folder``."""
    command = [sys.executable, "-m", "services.inference", "--model", str(folder / "tiny"), "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_url(process: subprocess.Popen[str]) -> str:
    """Where the process says that it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r'"port": (\d+)', line)
        if found:
            return f"http://127.0.0.1:{found[1]}"
    raise AssertionError("the service ended before it listened")
