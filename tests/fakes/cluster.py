"""A live cluster, as k8s/e2e/cluster.sh starts one around a command: kubectl, and the processes on its node."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import httpx

from tests.manifests.render import Document


def kubectl(*arguments: str, text: str | None = None, timeout: float = 300) -> str:
    """Run kubectl; returns what it printed. Raises AssertionError with its message."""
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"kubectl {' '.join(arguments[:3])}: {done.stderr.strip() or done.stdout[-2000:]}"
    return done.stdout


def pod_of(name: str, **labels: str) -> Document:
    """The only pod of a workload by its label ``app.kubernetes.io/name``, and others (``instance="silo-0"``)."""
    selector = ",".join(f"app.kubernetes.io/{key}={value}" for key, value in {"name": name, **labels}.items())
    pods = json.loads(kubectl("get", "pods", "--selector", selector, "--output", "json"))
    (found,) = pods["items"]
    assert isinstance(found, dict)
    return found


def restarts(pod: Document) -> int:
    """How often a pod's container has been started again."""
    count: int = pod["status"]["containerStatuses"][0]["restartCount"]
    return count


def is_ready(pod: Document) -> bool:
    """Whether Services send traffic to it."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"]["conditions"])


def process_of(pod: Document) -> int:
    """The process id, on the node, of a pod's container."""
    wanted = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    done = subprocess.run(
        ["ctr", "--namespace", "k8s.io", "task", "ls"], capture_output=True, text=True, timeout=60, check=True
    )
    return next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(wanted))


def signal_pod(name: str, number: int) -> Document:
    """Send a signal to a pod's first process, as the node; returns the pod as it was before."""
    before = pod_of(name)
    os.kill(process_of(before), number)
    return before


def eventually(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until something holds; returns after how many seconds. Raises AssertionError when it does not come."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, f"not after {seconds} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - started


def chat(client: httpx.Client, prompt: str, **options: object) -> httpx.Response:
    """One chat completion."""
    body = {"model": "fedward", "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, **options}
    return client.post("/v1/chat/completions", json=body)


def on_a_new_connection(client: httpx.Client) -> str:
    """A chat like a caller's who keeps no connections; returns what came of it."""
    with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60) as fresh:
        return str(chat(fresh, "Name three rivers.").status_code)


def on_a_kept_connection(client: httpx.Client) -> str:
    """A chat on a connection that is used again and again; returns what came of it."""
    return str(chat(client, "Name three trees.").status_code)


def as_a_stream(client: httpx.Client) -> str:
    """A longer answer in pieces; returns what came of it."""
    answer = chat(client, "How do I keep tomato plants healthy?", stream=True, max_tokens=96)
    return str(answer.status_code) if answer.text.endswith("[DONE]\n\n") else "a stream without an end"


@contextmanager
def load(client: httpx.Client) -> Iterator[Counter[str]]:
    """Callers of three kinds who ask without an end; counts what came of it, as ``<kind>: <status or error>``."""
    kinds = (on_a_new_connection, on_a_kept_connection, as_a_stream)
    seen: Counter[str] = Counter()
    over = Event()

    def ask(kind: Callable[[httpx.Client], str]) -> None:
        with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60) as own:
            while not over.wait(0.3):
                try:
                    seen[f"{kind.__name__}: {kind(own)}"] += 1
                except httpx.HTTPError as error:
                    seen[f"{kind.__name__}: {type(error).__name__} {error}"] += 1

    with ThreadPoolExecutor(len(kinds)) as threads:
        asking = [threads.submit(ask, kind) for kind in kinds]
        try:
            yield seen
        finally:
            over.set()
        for one in asking:
            one.result()
