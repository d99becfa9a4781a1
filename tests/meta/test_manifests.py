"""The Kubernetes manifests, as rendered, against Kubernetes' schemas and against the project's own code."""

import json
import re
import shutil
import subprocess
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from fastapi import FastAPI

from gateway.bench.install import IMAGE_EXTRAS
from gateway.policy_file import parse_policies
from gateway.quotas import read_quotas
from services.common.ports import free_port
from services.contracts.constitution import load_constitution
from stack.federation.settings import CoordinatorConfig, read_config
from tests.fakes.federation import NODE_LINES
from tests.fakes.model_servers import serving
from tests.manifests.hardening import hardening_problems, image_problems, probe_problems
from tests.manifests.metrics import alert_problems, exported, expression_problems
from tests.manifests.network import edges
from tests.manifests.references import (
    autoscaler_problems,
    name_problems,
    port_problems,
    quantity_problems,
    reference_problems,
    selector_problems,
    volume_problems,
)
from tests.manifests.render import (
    INSTALLATIONS,
    K8S,
    ROOT,
    Document,
    containers,
    installation,
    of_kind,
    render,
    workloads,
)
from tests.manifests.schema import VERSIONS, schema_problems
from tests.manifests.settings import file_problems, setting_problems
from trainer.bundle import build_bundle
from trainer.config import SILO_KEYS, default_run_config, parse_run_config

Check = Callable[[list[Document]], Iterator[str]]
CHECKS: tuple[Check, ...] = (
    name_problems,
    selector_problems,
    autoscaler_problems,
    port_problems,
    volume_problems,
    reference_problems,
    quantity_problems,
    hardening_problems,
    probe_problems,
    image_problems,
    setting_problems,
    file_problems,
    alert_problems,
)
OVERLAYS = sorted({overlay for overlays in INSTALLATIONS.values() for overlay in overlays})
MONITORING = K8S / "components/monitoring"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(overlay: str, version: str) -> None:
    problems = [problem for document in render(overlay) for problem in schema_problems(document, version)]
    assert not problems


@pytest.mark.parametrize("name", INSTALLATIONS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_installation_is_whole(name: str, check: Check) -> None:
    assert not list(check(installation(name)))


# Who may talk to whom. Everything else is closed.
SERVING = {
    ("stranger", "gateway", 8080),
    ("internet", "gateway", 8080),
    ("gateway", "safety", 8101),
    ("gateway", "inference", 8103),
    ("gateway", "critique", 8102),
    ("evaluation", "safety", 8101),
    ("evaluation", "inference", 8103),
    ("gateway", "dns", 53),
    ("evaluation", "dns", 53),
}
FEDERATING = {
    ("stranger", "training", 9092),
    ("internet", "training", 9092),
    ("training", "inference", 8103),
    ("training", "critique", 8102),
    ("training", "dns", 53),
}
DATABASES = {("gateway", "postgresql", 5432), ("gateway", "redis", 6379)}


def silo(number: str = "", shared: tuple[str, ...] = ()) -> set[tuple[str, str, int]]:
    """The edges of a silo; ``shared`` are the numbers of those that share a namespace with it."""
    node, code = f"supernode{number}", f"clientapp{number}"
    return {
        (code, node, 9094),
        *((code, f"supernode{other}", 9094) for other in shared),
        (code, "safety", 8101),
        (code, "critique", 8102),
        (code, "dns", 53),
        (node, "dns", 53),
    }


def scraped(*services: tuple[str, int]) -> set[tuple[str, str, int]]:
    return {("prometheus", service, port) for service, port in services}


SERVICES = (("gateway", 8080), ("safety", 8101), ("critique", 8102), ("inference", 8103), ("training", 8405))
EDGES = {
    "coordinator": SERVING | FEDERATING | DATABASES | scraped(*SERVICES),
    "gpu": SERVING
    | FEDERATING
    | DATABASES
    | scraped(*SERVICES, ("vllm-guard", 8000))
    | {("safety", "vllm-guard", 8000), ("critique", "inference", 8103), ("safety", "dns", 53), ("critique", "dns", 53)},
    # Out of a silo leads one way: from the SuperNode to the coordinator's Fleet port.
    "silo": silo() | {("supernode", "far-coordinator", 9092)} | scraped(("safety", 8101), ("critique", 8102)),
    "all-in-one": SERVING
    | FEDERATING
    | silo("-0", ("-1",))
    | silo("-1", ("-0",))
    | {("supernode-0", "training", 9092), ("supernode-1", "training", 9092)},
}
ENTRANCES = {"gateway", "training"}  # where anybody may knock: API keys, and keys of registered silos


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_network_policies_open_these_edges_and_no_other(name: str) -> None:
    expected = EDGES[name]
    anybody = {(source, target, port) for source, target, port in edges(installation(name)) if target in ENTRANCES}
    rest = edges(installation(name)) - anybody
    assert rest == {edge for edge in expected if edge[1] not in ENTRANCES}
    assert {(target, port) for _, target, port in anybody} == {
        (target, port) for _, target, port in expected if target in ENTRANCES
    }
    metrics = {edge for edge in anybody if edge[2] == 8405}
    assert metrics <= {("prometheus", "training", 8405)}


def configured(installation_name: str, config_map: str, key: str) -> str:
    """A file as it will lie in a ConfigMap, whose name has a hash at its end."""
    for document in of_kind(installation(installation_name), "ConfigMap"):
        if re.fullmatch(rf"{config_map}-[a-z0-9]{{10}}", document["metadata"]["name"]):
            text: str = document["data"][key]
            return text
    raise AssertionError(f"{installation_name} has no ConfigMap {config_map}")


@pytest.fixture(scope="module")
def healthy() -> Iterator[str]:
    app = FastAPI()
    app.add_api_route("/health", lambda: {"status": "ok"})
    with serving(app) as url:
        yield url.rsplit(":", 1)[1]


def alive(log: Path, port: str) -> bool:
    """What a SuperNode's liveness probe says."""
    node = next(one for one in workloads(installation("silo")) if one["metadata"]["name"] == "supernode")
    script = containers(node)[0]["livenessProbe"]["exec"]["command"]
    probe = [part.replace("/tmp/supernode.log", str(log)).replace("9094", port) for part in script]
    return subprocess.run(probe, timeout=20, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(("line", "lost"), NODE_LINES)
def test_node_that_only_a_new_start_mends_is_not_alive(tmp_path: Path, healthy: str, line: str, lost: bool) -> None:
    log = tmp_path / "supernode.log"
    log.write_text(f"INFO: SuperNode ID: 1\n{line}\n")
    assert alive(log, healthy) == (not lost)


def test_node_that_does_not_answer_is_not_alive(tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    log.write_text("INFO: SuperNode ID: 1\n")
    assert not alive(log, str(free_port()))


def test_gateway_reads_its_policy_and_its_limits(tmp_path: Path) -> None:
    parse_policies(configured("coordinator", "gateway", "policy.yaml").encode(), "policy.yaml")
    limits = tmp_path / "limits.toml"
    limits.write_text(configured("coordinator", "gateway", "limits.toml"))
    assert read_quotas(limits).default.requests


def test_constitution_is_the_projects_own(tmp_path: Path) -> None:
    path = tmp_path / "default.toml"
    path.write_text(configured("silo", "constitution", "default.toml"))
    shipped = load_constitution(ROOT / "services/critique/constitutions/default.toml")
    assert load_constitution(path).sha256 == shipped.sha256


@pytest.mark.parametrize("name", ["all-in-one", "coordinator"])
def test_trainer_takes_the_run_configuration(name: str) -> None:
    changes = tomllib.loads(configured(name, "run", "run.toml"))
    config = parse_run_config(default_run_config(ROOT / "pyproject.toml") | changes)
    assert str(config.run_dir).startswith("/runs/")


@pytest.mark.parametrize("name", ["all-in-one", "coordinator"])
def test_coordinator_takes_its_settings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(configured(name, "coordinator", "coordinator.toml"))
    config = read_config(CoordinatorConfig, path)
    run = tomllib.loads(configured(name, "run", "run.toml"))
    assert str(config.run_dir) == run["run-dir"]
    assert len(config.silo_keys) == run["num-clients"]


@pytest.mark.parametrize(("name", "config_map"), [("silo", "silo"), ("all-in-one", "silo-0"), ("all-in-one", "silo-1")])
def test_trainer_takes_what_a_silo_says_of_itself(name: str, config_map: str) -> None:
    own = tomllib.loads(configured(name, config_map, "node-config.toml"))
    assert own.keys() <= {*SILO_KEYS, "partition-id"}
    run = default_run_config(ROOT / "pyproject.toml") | tomllib.loads(configured("all-in-one", "run", "run.toml"))
    config = parse_run_config(run, silo=own)
    assert config.shard_data == "/data/shard.jsonl"
    assert config.safety_url == "http://safety:8101"


def test_numbers_of_the_demo_silos_are_0_and_1() -> None:
    numbers = [tomllib.loads(configured("all-in-one", f"silo-{n}", "node-config.toml"))["partition-id"] for n in (0, 1)]
    assert numbers == [0, 1]


def test_bundle_is_small_enough_for_a_config_map_that_kubectl_applies(tmp_path: Path) -> None:
    build_bundle(ROOT, tmp_path / "fedward.fab")
    encoded = len(b64encode((tmp_path / "fedward.fab").read_bytes()))
    assert encoded < 0.9 * 256 * 1024  # kubectl keeps a copy of what it applied in an annotation, and that is its limit


def test_no_secret_is_in_the_repository() -> None:
    files = subprocess.run(["git", "ls-files", "k8s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [path for path in files.splitlines() if "/secrets/" in path]
    assert "PRIVATE KEY" not in "".join((ROOT / path).read_text() for path in files.splitlines())


def test_version_of_the_images_is_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {image for overlay in OVERLAYS for image in re.findall(r"localhost/fedward/\S+", str(render(overlay)))}
    assert {image.strip("',").rsplit(":", 1)[1] for image in images} == {version}


def test_dockerfile_takes_the_makefiles_torch() -> None:
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert torch is not None
    assert f"ARG TORCH={torch[1]}\n" in (ROOT / "Dockerfile").read_text()


def test_benchmark_measures_the_gateway_with_what_its_image_holds() -> None:
    assert f"/meta[{','.join(IMAGE_EXTRAS)}]" in (ROOT / "Dockerfile").read_text()


def test_dashboard_shows_what_is_exported() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    assert len(dashboard["panels"]) >= 12
    problems = [
        problem
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for problem in expression_problems(panel["title"], target["expr"])
    ]
    assert not problems


def test_metrics_of_the_prometheus_adapter_are_those_of_the_autoscalers() -> None:
    adapter = yaml.safe_load((K8S / "components/autoscaling-queue/prometheus-adapter.yaml").read_text())
    served = set(re.findall(r"fedward_[a-z_]+", adapter["rules"]["custom"][0]["seriesQuery"]))
    asked = {
        metric["pods"]["metric"]["name"]
        for scaler in of_kind(installation("coordinator"), "HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
        if metric["type"] == "Pods"
    }
    assert asked == served <= exported().keys()


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian package prometheus) is not installed, so the alerts are not tried")
    rule = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rule["spec"]))
    shutil.copy(MONITORING / "alerts.test.yaml", tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    alerts = {
        rule["alert"]
        for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
        for rule in group["rules"]
    }
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == alerts


def test_proxy_exports_what_is_asked_of_it(tmp_path: Path) -> None:
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed, so its metrics are not compared")
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    timeouts = "".join(f"    timeout {side} 5s\n" for side in ("connect", "client", "server"))
    config.write_text(
        f"defaults\n    mode http\n{timeouts}frontend fleet\n    bind 127.0.0.1:{port}\n"
        "    http-request use-service prometheus-exporter if { path /metrics }\n"
    )
    asked = set(re.findall(r"haproxy_\w+", "".join(path.read_text() for path in MONITORING.iterdir())))
    with subprocess.Popen(["haproxy", "-db", "-f", str(config)], stderr=subprocess.DEVNULL) as proxy:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
                served = client.get(f"http://127.0.0.1:{port}/metrics").text
        finally:
            proxy.terminate()
    assert asked
    assert asked <= set(re.findall(r"haproxy_\w+", served))


def test_operations_guide_says_what_to_do_about_every_alert() -> None:
    alerts = re.findall(r"alert: (\w+)", (MONITORING / "alerts.yaml").read_text())
    guide = (ROOT / "docs/operations.md").read_text()
    assert re.findall(r"^### (Fedward\w+)$", guide, flags=re.M) == alerts
