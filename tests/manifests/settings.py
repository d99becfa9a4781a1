"""Environment variables and mounted files against what the code reads."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from gateway.settings import GatewaySettings
from services.common.settings import Settings
from services.contracts.constitution import describe
from services.critique.settings import CritiqueSettings
from services.inference.settings import InferenceSettings
from services.safety.settings import SafetySettings
from tests.manifests.references import items_of, source_of
from tests.manifests.render import Document, containers, name, of_kind, pod, workloads

PROCESSES: dict[str, type[Settings]] = {
    "gateway": GatewaySettings,
    "services.safety": SafetySettings,
    "services.critique": CritiqueSettings,
    "services.inference": InferenceSettings,
}
FILE = re.compile(r"/etc/fedward/[\w./-]+")
# Stands for a value that only the cluster has; fits every setting that comes from a Secret.
SECRETS = {
    "audit-url": "postgresql://user:password@postgresql.databases/audit",
    "limits-url": "redis://redis.databases:6379/0",
}


def setting_problems(documents: list[Document]) -> Iterator[str]:
    """Variables that the process of a container does not know, or would refuse."""
    for workload in workloads(documents):
        for one in containers(workload):
            variables = {v["name"]: v for v in one.get("env", []) if v["name"].startswith("FEDWARD_")}
            settings = process_of(one)
            if settings is None:
                yield from (f"{name(workload)}: nobody reads {variable}" for variable in variables)
                continue
            prefix = settings.model_config.get("env_prefix", "")
            values = {key.removeprefix(prefix).lower(): _value(variable) for key, variable in variables.items()}
            unknown = {key for key in variables if not key.startswith(prefix)} | (
                values.keys() - settings.model_fields.keys()
            )
            if unknown:
                yield f"{name(workload)}: {settings.__name__} has no {', '.join(sorted(unknown))}"
                continue
            try:
                read = settings.model_validate(values)
            except ValidationError as error:
                yield f"{name(workload)}: {describe(error)}"
                continue
            if read.port not in {port["containerPort"] for port in one["ports"]}:
                yield f"{name(workload)}: it listens on {read.port}, which is no port of the container"
            if read.host != "0.0.0.0":
                yield f"{name(workload)}: it listens on {read.host}, where no other pod can reach it"


def file_problems(documents: list[Document]) -> Iterator[str]:
    """Paths under /etc/fedward, in arguments, variables and mounted files, where nothing is mounted."""
    data = {
        name(d): {**d.get("data", {}), **d.get("binaryData", {})} for d in of_kind(documents, "ConfigMap", "Secret")
    }
    for workload in workloads(documents):
        sources = {volume["name"]: volume for volume in pod(workload).get("volumes", [])}
        for one in containers(workload):
            there: dict[str, str] = {}
            for mount in one.get("volumeMounts", []):
                volume = sources.get(mount["name"], {})
                content = data.get(source_of(volume) or "", {})
                shown = {item["path"]: content.get(item["key"], "") for item in items_of(volume)} or content
                there |= {f"{mount['mountPath']}/{key}": text for key, text in shown.items()}
                there[mount["mountPath"]] = ""
            texts = [*one.get("command", []), *one.get("args", []), *(v.get("value", "") for v in one.get("env", []))]
            texts += [text for path, text in there.items() if path.endswith(".toml")]
            named = {path for text in texts for path in FILE.findall(text)}
            yield from (f"{name(workload)}: {one['name']} finds no {path}" for path in sorted(named - there.keys()))


def process_of(container: dict[str, Any]) -> type[Settings] | None:
    """The settings of the process that a container starts; None when it is none of our services."""
    if container["image"].startswith("localhost/fedward/gateway"):
        return GatewaySettings
    if container["image"].startswith("localhost/fedward/service"):
        return PROCESSES[container["args"][0]]
    return None


def _value(variable: dict[str, Any]) -> str:
    if "value" in variable:
        value: str = variable["value"]
        return value
    return SECRETS[variable["valueFrom"]["secretKeyRef"]["key"]]
