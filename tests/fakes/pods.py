"""Containers that podman runs as the rendered manifests say: user, read-only root, variables, files, memory limit.

It is no cluster: there are no probes, restarts or network policies. Services are names on a network of its own.
"""

import base64
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.manifests.references import items_of, source_of
from tests.manifests.render import ROOT, Document, name, of_kind, pod

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
    """Some of an installation's deployments as containers on one network.

    Args:
        documents: the rendered installation.
        secrets: contents of the Secrets' keys, in place of the placeholders.
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
            for deployment in self.started:
                podman("rm", "--force", "--time", "5", self.container(deployment), check=False)
            podman("network", "rm", "--force", self._network, check=False)
            for volume in self._volumes:
                podman("volume", "rm", "--force", volume, check=False)

    def container(self, deployment: str) -> str:
        """The container's name."""
        return f"{self._network}-{deployment}"

    def start(self, deployment: str, *options: str) -> None:
        """Start a deployment's container under the name that its Service has."""
        workload = next(d for d in self._documents if name(d) == f"Deployment/{deployment}")
        spec, one = pod(workload), pod(workload)["containers"][0]
        security = {**spec["securityContext"], **one["securityContext"]}
        assert security["readOnlyRootFilesystem"], deployment
        assert security["capabilities"]["drop"] == ["ALL"], deployment
        command = ["run", "--detach", "--name", self.container(deployment), "--network", self._network]
        command += ["--network-alias", deployment, "--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL"]
        command += [
            "--security-opt",
            "no-new-privileges",
            "--user",
            f"{security['runAsUser']}:{security['runAsGroup']}",
        ]
        command += ["--memory", one["resources"]["limits"]["memory"].replace("i", "").lower(), *options]
        for variable in one.get("env", []):
            command += ["--env", f"{variable['name']}={self._value(variable)}"]
        for mount in one["volumeMounts"]:
            volume = next(v for v in spec["volumes"] if v["name"] == mount["name"])
            command += self._mount(volume, mount["mountPath"], deployment)
        self.started[deployment] = time.monotonic()
        podman(*command, one["image"], *one.get("args", []))

    def wait(self, deployment: str) -> float:
        """Wait until its readiness probe succeeds; returns the seconds since its start."""
        workload = next(d for d in self._documents if name(d) == f"Deployment/{deployment}")
        one = pod(workload)["containers"][0]
        url = f"http://127.0.0.1:{one['ports'][0]['containerPort']}{one['readinessProbe']['httpGet']['path']}"
        while True:
            try:
                self.python(deployment, ASK, url)
            except AssertionError as error:
                waited = time.monotonic() - self.started[deployment]
                running = podman("inspect", "--format", "{{.State.Running}}", self.container(deployment)) == "true"
                if waited > READY_SECONDS or not running:
                    raise AssertionError(f"{deployment} is not ready:\n{self.log(deployment)}") from error
                time.sleep(0.5)
            else:
                return time.monotonic() - self.started[deployment]

    def python(self, deployment: str, code: str, *arguments: str) -> str:
        """Run Python code inside a container; raises AssertionError when it fails."""
        return podman("exec", self.container(deployment), "python", "-c", code, *arguments)

    def log(self, deployment: str) -> str:
        """The end of what it has written."""
        return podman("logs", "--tail", "20", self.container(deployment), check=False)

    def megabytes(self, deployment: str) -> float:
        """What its processes hold in memory."""
        pages = self.python(deployment, "print(open('/proc/1/statm').read().split()[1])")
        return int(pages) * 4096 / 1e6

    def stop(self, deployment: str) -> int:
        """Ask it to end; returns its exit code."""
        podman("stop", "--time", "60", self.container(deployment))
        return int(podman("inspect", "--format", "{{.State.ExitCode}}", self.container(deployment)))

    def _value(self, variable: dict[str, Any]) -> str:
        if "value" in variable:
            value: str = variable["value"]
            return value
        reference = variable["valueFrom"]["secretKeyRef"]
        return self._content(f"Secret/{reference['name']}")[reference["key"]].decode()

    def _mount(self, volume: dict[str, Any], place: str, deployment: str) -> list[str]:
        if "emptyDir" in volume:
            size = volume["emptyDir"]["sizeLimit"].replace("i", "").lower()
            return ["--tmpfs", f"{place}:size={size},mode=1777"]
        if claim := volume.get("persistentVolumeClaim"):
            kept = f"{self._network}-{claim['claimName']}"
            self._volumes.add(kept)
            return ["--volume", f"{kept}:{place}:U"]
        source = source_of(volume)
        assert source is not None
        folder = self._folder / deployment / volume["name"]
        folder.mkdir(parents=True)
        content = self._content(source)
        for key, path in {i["key"]: i["path"] for i in items_of(volume)}.items() or {k: k for k in content}.items():
            (folder / path).write_bytes(content[key])
            (folder / path).chmod(0o444)
        return ["--volume", f"{folder}:{place}:ro"]

    def _content(self, source: str) -> dict[str, bytes]:
        document = next(d for d in of_kind(self._documents, "ConfigMap", "Secret") if name(d) == source)
        if document["kind"] == "ConfigMap":
            return {key: text.encode() for key, text in document["data"].items()}
        return {key: self._secrets.get(key, base64.b64decode(text)) for key, text in document["data"].items()}


def image_megabytes(image: str) -> float:
    """An image's size, uncompressed."""
    return int(podman("image", "inspect", "--format", "{{.Size}}", image)) / 1e6


def bill_of_materials(image: str) -> set[str]:
    """The names of the Python packages that an image says it has."""
    code = "print(open('/sbom/python.cdx.json').read())"
    text = podman("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", code)
    return {component["name"].lower() for component in json.loads(text)["components"]}
