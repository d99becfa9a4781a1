"""What a network plugin would make of the overlay's policies: iptables rules between the pods of a live cluster.

The edges are those that tests/manifests/network.py reads from the rendered policies; which addresses they stand for is
asked of the cluster again and again. Debian has no network plugin that enforces policies, and a cluster without one
would not show an edge that somebody needs and nobody has opened.
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tests.fakes.cluster import kubectl
from tests.manifests.network import DNS, edges
from tests.manifests.render import Document

PODS = "10.244.0.0/24"  # as in k8s/e2e/inside.sh
DNS_ADDRESS = "10.96.0.10"
EVERY_SECONDS = 1.0


@contextmanager
def policies_enforced(documents: list[Document]) -> Iterator[None]:
    """Let pods talk along the edges that their policies open, and along no other, until the end."""
    opened = edges(documents)
    over = Event()
    failed: list[Exception] = []

    def keep() -> None:
        seen = ""
        while not over.wait(EVERY_SECONDS):
            try:
                if (rules := rules_of(opened, addresses())) != seen:
                    iptables_restore(rules)
                    seen = rules
            except (AssertionError, subprocess.SubprocessError) as error:
                failed.append(error)

    iptables_restore(rules_of(set(), {}))
    for chain in ("FORWARD", "INPUT"):
        subprocess.run(["iptables", "--insert", chain, "--jump", "FEDWARD"], check=True)
    thread = Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failed, failed


def addresses() -> dict[str, list[str]]:
    """The addresses of each workload's pods, by the workload's name."""
    found: dict[str, list[str]] = defaultdict(list)
    for pod in json.loads(kubectl("get", "pods", "--output", "json"))["items"]:
        if address := pod["status"].get("podIP"):
            found[workload_of(pod)].append(address)
    return found


def workload_of(pod: Document) -> str:
    """The name of the Deployment or Job that has made a pod."""
    (owner,) = pod["metadata"]["ownerReferences"]
    template = pod["metadata"]["labels"].get("pod-template-hash")
    name: str = owner["name"]
    return name.removesuffix(f"-{template}") if template else name


def rules_of(opened: set[tuple[str, str, int]], places: dict[str, list[str]]) -> str:
    """One chain: answers, the opened edges, and nothing else from or to a pod. The node itself reaches every pod."""
    lines = ["*filter", ":FEDWARD - [0:0]", "-A FEDWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    for source, target, port in sorted(opened):
        protocols = ["tcp", "udp"] if target == DNS.name else ["tcp"]
        targets = [DNS_ADDRESS] if target == DNS.name else places.get(target, [])
        lines += [
            f"-A FEDWARD -s {one} -d {other} -p {protocol} --dport {port} -j ACCEPT"
            for one in places.get(source, [])
            for other in targets
            for protocol in protocols
        ]
    return "\n".join([*lines, f"-A FEDWARD -s {PODS} -j DROP", "COMMIT", ""])


def iptables_restore(rules: str) -> None:
    """Put the chain in place, all at once."""
    subprocess.run(["iptables-restore", "--noflush"], input=rules, text=True, check=True, capture_output=True)
