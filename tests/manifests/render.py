"""The overlays as `kubectl apply -k` would send them, with placeholders where an operator lays secrets."""

import atexit
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
Document = dict[str, Any]
SECRET_FILE = re.compile(r"secrets/[\w-][\w.-]*")

# What is installed together: an overlay, and the jobs that are started in it.
INSTALLATIONS = {
    "all-in-one": ("all-in-one", "all-in-one/training", "all-in-one/evaluation"),
    "coordinator": ("coordinator", "coordinator/training", "coordinator/evaluation"),
    "silo": ("silo",),
    "gpu": ("gpu", "coordinator/training", "coordinator/evaluation"),
}


@functools.cache
def tree_with_secrets() -> Path:
    """A copy of what kustomize reads; every secret file has its own name as its content."""
    folder = Path(tempfile.mkdtemp(prefix="fedward-manifests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(K8S, folder / "k8s", ignore=shutil.ignore_patterns("secrets"))
    constitutions = Path("services/critique/constitutions")
    shutil.copytree(ROOT / constitutions, folder / constitutions)
    for kustomization in (folder / "k8s/overlays").rglob("kustomization.yaml"):
        for name in secret_files(kustomization):
            path = kustomization.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(path.name)
    return folder


def secret_files(kustomization: Path) -> set[str]:
    """The files that an operator has to bring, relative to the overlay."""
    return set(SECRET_FILE.findall(kustomization.read_text()))


@functools.cache
def render(overlay: str) -> tuple[Document, ...]:
    """Every document of an overlay; the test is skipped where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, so the manifests are not checked")
    command = ["kubectl", "kustomize", str(tree_with_secrets() / "k8s/overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def installation(name: str) -> list[Document]:
    """All documents that exist together once an overlay is installed and its jobs are started."""
    return [document for overlay in INSTALLATIONS[name] for document in render(overlay)]


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    """The documents of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def workloads(documents: list[Document]) -> list[Document]:
    """Whatever makes pods."""
    return of_kind(documents, "Deployment", "Job")


def labels(workload: Document) -> dict[str, str]:
    """The labels of a workload's pods."""
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def pod(workload: Document) -> dict[str, Any]:
    """The specification of a workload's pods."""
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def containers(workload: Document) -> list[dict[str, Any]]:
    """A pod's containers, initial ones included."""
    return [*pod(workload).get("initContainers", []), *pod(workload)["containers"]]


def name(document: Document) -> str:
    """Kind and name, for messages."""
    return f"{document['kind']}/{document['metadata']['name']}"


def matches(selector: dict[str, Any], found: dict[str, str]) -> bool:
    """Whether a label selector chooses something with these labels."""
    if any(found.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In", f"the checks do not know the operator {one['operator']}"
        if found.get(one["key"]) not in one["values"]:
            return False
    return True


def main(out: Path) -> None:
    """Write every overlay as one file, for a linter: ``python -m tests.manifests.render FOLDER``."""
    out.mkdir(parents=True, exist_ok=True)
    for overlay in sorted({overlay for overlays in INSTALLATIONS.values() for overlay in overlays}):
        (out / f"{overlay.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all(render(overlay)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
