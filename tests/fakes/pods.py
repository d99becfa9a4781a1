"""Containers that podman runs as the rendered manifests say: user, read-only root, variables, files, memory limit.

It is no cluster: there are no probes, restarts or network policies. Services are names on a network of its own.
"""

import base64
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.manifests.references import items_of, source_of
from tests.manifests.render import ROOT, Document, labels, matches, name, of_kind, pod, workloads

CONTAINERS_CONF = ROOT / "k8s/containers.conf"
READY_SECONDS = 180.0
ASK = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)"


def podman(*arguments: str, check: bool = True, timeout: float = 300) -> str:
    """Run podman; returns what it printed. Raises AssertionError with its message."""
    env = dict(os.environ)
    if os.geteuid() == 0:
        env.setdefault("CONTAINERS_CONF", str(CONTAINERS_CONF))
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=timeout, env=env)
    assert done.returncode == 0 or not check, f"podman {' '.join(arguments[:3])}: {done.stderr.strip()}"
    return done.stdout.strip()


class Pods:
    """Some of an installation's workloads as containers on one network.

    Args:
        documents: the rendered installation.
        secrets: what an operator brings, as ``<ConfigMap or Secret>/<key>``, in place of the placeholders.
        folder: where files are kept that containers see.
    """

    def __init__(self, documents: list[Document], secrets: Mapping[str, bytes], folder: Path) -> None:
        self._documents = documents
        self._secrets = secrets
        self._folder = folder
        self._network = f"fedward-{uuid.uuid4().hex[:8]}"
        self._volumes: set[str] = set()
        self.started: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator["Pods"]:
        """A network for them; everything is removed at the end."""
        podman("network", "create", self._network)
        try:
            yield self
        finally:
            for workload in self.started:
                podman("rm", "--force", "--time", "5", self.container(workload), check=False)
            podman("network", "rm", "--force", self._network, check=False)
            for volume in self._volumes:
                podman("volume", "rm", "--force", volume, check=False)

    def container(self, workload: str) -> str:
        """The container's name."""
        return f"{self._network}-{workload}"

    def volume(self, claim: str) -> str:
        """The name of the volume that stands for a claim."""
        return f"{self._network}-{claim}"

    def start(self, workload: str, *options: str) -> None:
        """Start a workload's container under the names that its Services have, after its initial containers."""
        document = self._document(workload)
        for one in pod(document).get("initContainers", []):
            podman("run", "--rm", *self._options(document, one), one["image"], *_arguments(one, {}))
        one = pod(document)["containers"][0]
        variables = {variable["name"]: self._value(variable) for variable in one.get("env", [])}
        command = ["run", "--detach", "--name", self.container(workload), *self._options(document, one), *options]
        for service in of_kind(self._documents, "Service"):
            if matches({"matchLabels": service["spec"]["selector"]}, labels(document)):
                command += ["--network-alias", service["metadata"]["name"]]
        for key, value in variables.items():
            command += ["--env", f"{key}={value}"]
        self.started[workload] = time.monotonic()
        podman(*command, one["image"], *_arguments(one, variables))

    def wait(self, workload: str) -> float:
        """Wait until its readiness probe succeeds; returns the seconds since its start."""
        one = pod(self._document(workload))["containers"][0]
        url = f"http://127.0.0.1:{one['ports'][0]['containerPort']}{one['readinessProbe']['httpGet']['path']}"
        while True:
            try:
                self.python(workload, ASK, url)
            except AssertionError as error:
                waited = time.monotonic() - self.started[workload]
                if waited > READY_SECONDS or not self.is_running(workload):
                    raise AssertionError(f"{workload} is not ready:\n{self.log(workload)}") from error
                time.sleep(0.5)
            else:
                return time.monotonic() - self.started[workload]

    def is_running(self, workload: str) -> bool:
        """Whether its process has not ended."""
        return podman("inspect", "--format", "{{.State.Running}}", self.container(workload)) == "true"

    def exit_code(self, workload: str) -> int:
        """How a process that has ended did so."""
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.container(workload)))

    def python(self, workload: str, code: str, *arguments: str) -> str:
        """Run Python code inside a container; raises AssertionError when it fails."""
        return podman("exec", self.container(workload), "python", "-c", code, *arguments)

    def log(self, workload: str) -> str:
        """The end of what it has written."""
        done = subprocess.run(
            ["podman", "logs", "--tail", "30", self.container(workload)], capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    def megabytes(self, workload: str) -> float:
        """What its first process holds in memory."""
        pages = self.python(workload, "print(open('/proc/1/statm').read().split()[1])")
        return int(pages) * 4096 / 1e6

    def stop(self, workload: str) -> int:
        """Ask it to end; returns its exit code."""
        podman("stop", "--time", "60", self.container(workload))
        return self.exit_code(workload)

    def _document(self, workload: str) -> Document:
        return next(d for d in workloads(self._documents) if d["metadata"]["name"] == workload)

    def _options(self, document: Document, one: dict[str, Any]) -> list[str]:
        """How a container is confined and what it sees."""
        spec = pod(document)
        security = {**spec["securityContext"], **one["securityContext"]}
        assert security["readOnlyRootFilesystem"], one["name"]
        assert security["capabilities"]["drop"] == ["ALL"], one["name"]
        options = ["--network", self._network, "--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL"]
        options += [
            "--security-opt",
            "no-new-privileges",
            "--user",
            f"{security['runAsUser']}:{security['runAsGroup']}",
        ]
        options += ["--memory", _podman_size(one["resources"]["limits"]["memory"])]
        if "command" in one:
            options += ["--entrypoint", json.dumps(one["command"])]
        for mount in one["volumeMounts"]:
            volume = next(v for v in spec["volumes"] if v["name"] == mount["name"])
            options += self._mount(volume, mount["mountPath"], document["metadata"]["name"])
        return options

    def _value(self, variable: dict[str, Any]) -> str:
        if "value" in variable:
            value: str = variable["value"]
            return value
        ((field, reference),) = variable["valueFrom"].items()
        kind = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[field]
        return self._content(f"{kind}/{reference['name']}")[reference["key"]].decode()

    def _mount(self, volume: dict[str, Any], place: str, workload: str) -> list[str]:
        if "emptyDir" in volume:
            return ["--tmpfs", f"{place}:size={_podman_size(volume['emptyDir']['sizeLimit'])},mode=1777"]
        if claim := volume.get("persistentVolumeClaim"):
            self._volumes.add(self.volume(claim["claimName"]))
            return ["--volume", f"{self.volume(claim['claimName'])}:{place}:U"]
        source = source_of(volume)
        assert source is not None
        folder = self._folder / workload / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        content = self._content(source)
        for key, path in {i["key"]: i["path"] for i in items_of(volume)}.items() or {k: k for k in content}.items():
            (folder / path).write_bytes(content[key])
            (folder / path).chmod(0o444)
        return ["--volume", f"{folder}:{place}:ro"]

    def _content(self, source: str) -> dict[str, bytes]:
        document = next(d for d in of_kind(self._documents, "ConfigMap", "Secret") if name(d) == source)
        if document["kind"] == "ConfigMap":
            content = {key: text.encode() for key, text in document["data"].items()}
        else:
            content = {key: base64.b64decode(text) for key, text in document["data"].items()}
        # A placeholder is its file's own name.
        return {key: self._secrets.get(f"{document['metadata']['name'].rpartition('-')[0]}/{key}", value)
                for key, value in content.items()}  # fmt: skip


def _arguments(one: dict[str, Any], variables: Mapping[str, str]) -> list[str]:
    """A container's arguments, with the variables that Kubernetes puts into them."""
    return [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text) for text in one.get("args", [])]


def _podman_size(quantity: str) -> str:
    return quantity.replace("i", "").lower()


def image_megabytes(image: str) -> float:
    """An image's size, uncompressed."""
    return int(podman("image", "inspect", "--format", "{{.Size}}", image)) / 1e6


def bill_of_materials(image: str) -> set[str]:
    """The names of the Python packages that an image says it has."""
    code = "print(open('/sbom/python.cdx.json').read())"
    text = podman("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", code)
    return {component["name"].lower() for component in json.loads(text)["components"]}
