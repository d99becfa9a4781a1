"""Every document against Kubernetes' own schemas, all errors of each, unknown fields included."""

import functools
import re
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from tests.manifests.render import Document, name

VERSIONS = ("1.36", "1.37")  # the two newest that kubernetes-validate has
# Kinds that an operator adds to a cluster; their schemas are not part of Kubernetes.
CUSTOM = {("monitoring.coreos.com/v1", "ServiceMonitor"), ("monitoring.coreos.com/v1", "PrometheusRule")}


def schema_problems(document: Document, version: str) -> list[str]:
    """All that Kubernetes of that version would refuse in a document; a removed API counts, too."""
    api, kind = document["apiVersion"], document["kind"]
    if (api, kind) in CUSTOM:
        return []
    try:
        validator = _validator(api, kind, version)
    except FileNotFoundError:
        return [f"{name(document)}: Kubernetes {version} has no {kind} in {api}"]
    return [f"{name(document)}: {error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@functools.cache
def _validator(api: str, kind: str, version: str) -> Any:
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    group = re.sub(
        r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api
    )  # as the files are named: networking.k8s.io/v1 -> networking-v1
    schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    return Draft202012Validator(schema, registry=_definitions(folder, version))


@functools.cache
def _definitions(folder: str, version: str) -> Any:
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", version)) @ Registry()
