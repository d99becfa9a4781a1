"""Every container runs as an ordinary user on a read-only root, without capabilities and without a Kubernetes token."""

import re
from collections.abc import Iterator

from tests.manifests.render import ROOT, Document, containers, name, pod, workloads

POD = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
FORBIDDEN = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
OURS = "localhost/fedward/"


def hardening_problems(documents: list[Document]) -> Iterator[str]:
    """What a pod may do that it need not."""
    for workload in workloads(documents):
        spec = pod(workload)
        for key, value in POD.items():
            if spec.get("securityContext", {}).get(key) != value:
                yield f"{name(workload)}: securityContext.{key} is not {value}"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name(workload)}: it gets a token for the Kubernetes API"
        if spec.get("enableServiceLinks") is not False:
            yield f"{name(workload)}: service links are on"
        yield from (f"{name(workload)}: {key} is set" for key in FORBIDDEN if spec.get(key))
        yield from (
            f"{name(workload)}: a hostPath volume" for volume in spec.get("volumes", []) if "hostPath" in volume
        )
        for one in containers(workload):
            for key, value in CONTAINER.items():
                if one.get("securityContext", {}).get(key) != value:
                    yield f"{name(workload)}: {one['name']}: securityContext.{key} is not {value}"


def probe_problems(documents: list[Document]) -> Iterator[str]:
    """Containers that serve and are not asked whether they do."""
    for workload in workloads(documents):
        for one in pod(workload)["containers"]:
            missing = [probe for probe in PROBES if probe not in one] if one.get("ports") else []
            yield from (f"{name(workload)}: {one['name']} has no {probe}" for probe in missing)


def image_problems(documents: list[Document]) -> Iterator[str]:
    """Images without a fixed version, and images of ours that the Dockerfile does not build."""
    targets = set(re.findall(r"^FROM .* AS (\S+)", (ROOT / "Dockerfile").read_text(), flags=re.M))
    for workload in workloads(documents):
        for one in containers(workload):
            image = one["image"]
            version = re.search(r"(@sha256:[0-9a-f]{64}|:[^:/]+)$", image)
            if version is None or version[1] == ":latest":
                yield f"{name(workload)}: {image} has no fixed version"
            elif image.startswith(OURS) and image.removeprefix(OURS).removesuffix(version[1]) not in targets:
                yield f"{name(workload)}: the Dockerfile does not build {image}"
