"""What a document names exists: pods behind selectors, ports, volumes, ConfigMaps, Secrets, claims, services."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.manifests.render import Document, containers, labels, matches, name, of_kind, pod, workloads

URL = re.compile(r"http://([a-z][a-z0-9-]*):(\d+)")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
FACTORS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    unit: 1024**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1)
}
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def name_problems(documents: list[Document]) -> Iterator[str]:
    """Names that Kubernetes refuses, and two documents of one name."""
    for document in documents:
        if not DNS_LABEL.fullmatch(document["metadata"]["name"]):
            yield f"{name(document)}: not a valid name"
    for workload in workloads(documents):
        for one in containers(workload):
            if not DNS_LABEL.fullmatch(one["name"]):
                yield f"{name(workload)}: container {one['name']}: not a valid name"
    keys = Counter((d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents)
    yield from (f"{kind}/{found}: there are {count}" for (kind, _, found), count in keys.items() if count > 1)


def selector_problems(documents: list[Document]) -> Iterator[str]:
    """Selectors that choose no pod, and pods that their own workload would not find."""
    pods = [labels(workload) for workload in workloads(documents)]
    for deployment in of_kind(documents, "Deployment"):
        own = [("its selector", deployment["spec"]["selector"])]
        own += [
            ("a spread", spread["labelSelector"]) for spread in pod(deployment).get("topologySpreadConstraints", [])
        ]
        for what, selector in own:
            if not matches(selector, labels(deployment)):
                yield f"{name(deployment)}: {what} does not choose its own pods"
    selectors = [(d, {"matchLabels": d["spec"]["selector"]}) for d in of_kind(documents, "Service")]
    selectors += [(d, d["spec"]["selector"]) for d in of_kind(documents, "PodDisruptionBudget")]
    selectors += [(d, d["spec"]["podSelector"]) for d in of_kind(documents, "NetworkPolicy")]
    for document, selector in selectors:
        if not any(matches(selector, found) for found in pods):
            yield f"{name(document)}: there is no such pod"


def autoscaler_problems(documents: list[Document]) -> Iterator[str]:
    """Autoscalers of nothing, with bounds in the wrong order, or of what sets its number of pods itself."""
    deployments = {document["metadata"]["name"]: document for document in of_kind(documents, "Deployment")}
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        target = deployments.get(scaler["spec"]["scaleTargetRef"]["name"])
        if target is None:
            yield f"{name(scaler)}: it scales what does not exist"
        elif "replicas" in target["spec"]:
            yield f"{name(scaler)}: {name(target)} sets its replicas itself"
        if scaler["spec"].get("minReplicas", 1) > scaler["spec"]["maxReplicas"]:
            yield f"{name(scaler)}: minReplicas is above maxReplicas"


def port_problems(documents: list[Document]) -> Iterator[str]:
    """Ports of services, probes and URLs that nobody listens on."""
    for service in of_kind(documents, "Service"):
        for workload in workloads(documents):
            if matches({"matchLabels": service["spec"]["selector"]}, labels(workload)):
                missing = {port["targetPort"] for port in service["spec"]["ports"]} - _ports(workload).keys()
                yield from (f"{name(service)}: {name(workload)} has no port {port}" for port in sorted(missing))
    for workload in workloads(documents):
        for one in containers(workload):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                check = one.get(probe, {})
                port = check.get("httpGet", check.get("tcpSocket", {})).get("port")
                if port is not None and port not in {found["name"] for found in one.get("ports", [])}:
                    yield f"{name(workload)}: {probe} asks port {port}, which is not there"
    listening = {
        (service["metadata"]["name"], str(port["port"]))
        for service in of_kind(documents, "Service")
        for port in service["spec"]["ports"]
    }
    for document in documents:
        missing_urls = {found for text in _texts(document) for found in URL.findall(text)} - listening
        yield from (f"{name(document)}: there is no service {host}:{port}" for host, port in sorted(missing_urls))


def volume_problems(documents: list[Document]) -> Iterator[str]:
    """Mounts without a volume, volumes without a mount, two mounts in one place."""
    for workload in workloads(documents):
        volumes = [volume["name"] for volume in pod(workload).get("volumes", [])]
        mounted = set()
        for one in containers(workload):
            mounts = one.get("volumeMounts", [])
            mounted |= {mount["name"] for mount in mounts}
            places = Counter(mount["mountPath"] for mount in mounts)
            yield from (f"{name(workload)}: two mounts on {place}" for place, n in places.items() if n > 1)
        yield from (f"{name(workload)}: no volume {volume}" for volume in sorted(mounted - set(volumes)))
        yield from (f"{name(workload)}: volume {volume} is never mounted" for volume in sorted(set(volumes) - mounted))


def reference_problems(documents: list[Document]) -> Iterator[str]:
    """ConfigMaps, Secrets, their keys, claims and accounts that are used and do not exist."""
    data = {
        name(d): {**d.get("data", {}), **d.get("binaryData", {})}.keys()
        for d in of_kind(documents, "ConfigMap", "Secret")
    }
    other = {name(document) for document in documents}
    for workload in workloads(documents):
        wanted = f"ServiceAccount/{pod(workload).get('serviceAccountName')}"
        # A job comes into an installation whose account and claims are there already.
        if wanted not in other:
            yield f"{name(workload)}: there is no {wanted}"
        for volume in pod(workload).get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                if f"PersistentVolumeClaim/{claim['claimName']}" not in other:
                    yield f"{name(workload)}: there is no claim {claim['claimName']}"
            elif source := source_of(volume):
                yield from _missing(name(workload), data, source, [i["key"] for i in items_of(volume)])
        for one in containers(workload):
            for variable in one.get("env", []):
                for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                    if reference := variable.get("valueFrom", {}).get(field):
                        yield from _missing(name(workload), data, f"{kind}/{reference['name']}", [reference["key"]])


def quantity_problems(documents: list[Document]) -> Iterator[str]:
    """Quantities that do not parse, requests above limits, containers without the figures that a scheduler needs."""
    for workload in workloads(documents):
        for one in containers(workload):
            resources = one.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
                yield f"{name(workload)}: {one['name']} needs requests of cpu and memory and a limit of memory"
            for text in (*requests.values(), *limits.values()):
                if amount(text) is None:
                    yield f"{name(workload)}: {text!r} is no quantity"
            for resource in requests.keys() & limits.keys():
                asked, most = amount(requests[resource]), amount(limits[resource])
                if asked is not None and most is not None and asked > most:
                    yield f"{name(workload)}: {one['name']} requests more {resource} than its limit"
        for volume in pod(workload).get("volumes", []):
            if "emptyDir" in volume and amount(volume["emptyDir"].get("sizeLimit", "")) is None:
                yield f"{name(workload)}: the emptyDir {volume['name']} needs a sizeLimit"
    for claim in of_kind(documents, "PersistentVolumeClaim"):
        if amount(claim["spec"]["resources"]["requests"]["storage"]) is None:
            yield f"{name(claim)}: its storage is no quantity"


def amount(text: str) -> float | None:
    """A quantity as a number; None when it is none."""
    found = QUANTITY.fullmatch(str(text))
    return float(found[1]) * FACTORS[found[2] or ""] if found else None


def source_of(volume: dict[str, Any]) -> str | None:
    """Which ConfigMap or Secret a volume shows."""
    if "configMap" in volume:
        return f"ConfigMap/{volume['configMap']['name']}"
    return f"Secret/{volume['secret']['secretName']}" if "secret" in volume else None


def items_of(volume: dict[str, Any]) -> list[dict[str, str]]:
    """The keys that a volume shows by name; empty when it shows all."""
    found: list[dict[str, str]] = volume.get("configMap", volume.get("secret", {})).get("items", [])
    return found


def _missing(user: str, data: dict[str, Any], source: str, keys: list[str]) -> Iterator[str]:
    if source not in data:
        yield f"{user}: there is no {source}"
    else:
        yield from (f"{user}: {source} has no key {key}" for key in keys if key not in data[source])


def _ports(workload: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in containers(workload) for port in one.get("ports", [])}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
