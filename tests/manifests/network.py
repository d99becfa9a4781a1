"""Who can reach whom, by the rendered NetworkPolicies alone."""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from tests.manifests.render import Document, containers, labels, matches, of_kind, workloads

NAME = "app.kubernetes.io/name"
NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Party:
    """One end of a connection: a pod, or an address outside the cluster. ``ports`` maps the names of a pod's ports."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "fedward"
    ports: dict[str, int] = field(default_factory=dict)
    address: str | None = None


STRANGER = Party("stranger", {NAME: "somebody"}, "elsewhere")
PROMETHEUS = Party("prometheus", {NAME: "prometheus"}, "monitoring")
DNS = Party("dns", {"k8s-app": "kube-dns"}, "kube-system", {"dns": 53})
POSTGRESQL = Party("postgresql", {NAME: "postgresql"}, "databases", {"sql": 5432})
REDIS = Party("redis", {NAME: "redis"}, "databases", {"redis": 6379})
INTERNET = Party("internet", address="198.51.100.7", ports={"https": 443, "fleet": 9092})
COORDINATOR = Party("far-coordinator", address="203.0.113.10", ports={"fleet": 9092, "control": 8000})
OTHERS = (STRANGER, PROMETHEUS, DNS, POSTGRESQL, REDIS, INTERNET, COORDINATOR)


def edges(documents: list[Document]) -> set[tuple[str, str, int]]:
    """Every connection that the policies allow between pods, and between pods and the parties above."""
    policies = of_kind(documents, "NetworkPolicy")
    ours = [_party(workload) for workload in workloads(documents)]
    return {
        (source.name, target.name, port)
        for source in (*ours, *OTHERS)
        for target in (*ours, *OTHERS)
        for port in target.ports.values()
        if source != target and (source in ours or target in ours)
        if _allows(policies, "Egress", source, target, port, ours)
        and _allows(policies, "Ingress", target, source, port, ours)
    }


def _party(workload: Document) -> Party:
    ports = {port["name"]: port["containerPort"] for one in containers(workload) for port in one.get("ports", [])}
    return Party(workload["metadata"]["name"], labels(workload), workload["metadata"]["namespace"], ports)


def _allows(policies: list[Document], direction: str, party: Party, peer: Party, port: int, ours: list[Party]) -> bool:
    """Whether the policies that hold for ``party`` let it talk to ``peer``; others' policies are not ours to know."""
    if party not in ours:
        return True
    holding = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == party.namespace
        and direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], party.labels)
    ]
    if not holding:
        return True
    listener = party if direction == "Ingress" else peer
    return any(
        _peer_matches(rule.get("to" if direction == "Egress" else "from"), peer, party.namespace)
        and _port_matches(rule.get("ports"), port, listener)
        for spec in holding
        for rule in spec.get(direction.lower(), [])
    )


def _peer_matches(peers: list[dict[str, Any]] | None, peer: Party, namespace: str) -> bool:
    if not peers:
        return True
    for one in peers:
        if block := one.get("ipBlock"):
            assert "except" not in block, "the checks do not know `except`"
            if peer.address and ip_address(peer.address) in ip_network(block["cidr"]):
                return True
        elif peer.address is None:
            elsewhere = one.get("namespaceSelector")
            there = matches(elsewhere, {NAMESPACE: peer.namespace}) if elsewhere else peer.namespace == namespace
            if there and matches(one.get("podSelector", {}), peer.labels):
                return True
    return False


def _port_matches(ports: list[dict[str, Any]] | None, port: int, listener: Party) -> bool:
    return ports is None or any(listener.ports.get(one["port"], one["port"]) == port for one in ports)
