"""The checks of the manifests find what they are for: each is given a manifest that was broken on purpose."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.manifests.hardening import hardening_problems, image_problems, probe_problems
from tests.manifests.metrics import alert_problems, expression_problems
from tests.manifests.network import edges
from tests.manifests.references import (
    amount,
    autoscaler_problems,
    name_problems,
    port_problems,
    quantity_problems,
    reference_problems,
    selector_problems,
    volume_problems,
)
from tests.manifests.render import Document, installation, name
from tests.manifests.schema import VERSIONS, schema_problems
from tests.manifests.settings import file_problems, setting_problems
from tests.meta.test_manifests import Check

Break = Callable[[dict[str, Any]], object]


def broken(document_name: str, change: Break) -> list[Document]:
    """The coordinator's installation with one document changed; a ConfigMap or Secret is named without its hash."""
    documents = copy.deepcopy(installation("coordinator"))
    found = next(d for d in documents if name(d) == document_name or name(d).rpartition("-")[0] == document_name)
    change(found)
    return documents


def spec(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["template"]["spec"]
    return found


def container(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec(document)["containers"][0]
    return found


def variable(document: dict[str, Any], key: str) -> dict[str, Any]:
    return next(found for found in container(document)["env"] if found["name"] == key)


GATEWAY, TRAINING = "Deployment/gateway", "Job/training"
BROKEN: list[tuple[Check, str, Break, str]] = [
    (name_problems, GATEWAY, lambda d: container(d).update(name="GW_bad"), "GW_bad: not a valid name"),
    (name_problems, GATEWAY, lambda d: d["metadata"].update(name="inference"), "there are 2"),
    (selector_problems, GATEWAY, lambda d: d["spec"]["selector"].update(matchLabels={"a": "b"}), "its selector"),
    (selector_problems, "Service/safety", lambda d: d["spec"].update(selector={"a": "b"}), "no such pod"),
    (selector_problems, "PodDisruptionBudget/safety",
     lambda d: d["spec"].update(selector={"matchLabels": {"a": "b"}}), "no such pod"),
    (selector_problems, "NetworkPolicy/inference",
     lambda d: d["spec"]["podSelector"]["matchLabels"].update({"a": "b"}), "no such pod"),
    (autoscaler_problems, "HorizontalPodAutoscaler/gateway", lambda d: d["spec"].update(minReplicas=9), "above max"),
    (autoscaler_problems, "HorizontalPodAutoscaler/gateway",
     lambda d: d["spec"]["scaleTargetRef"].update(name="gatewya"), "does not exist"),
    (autoscaler_problems, GATEWAY, lambda d: d["spec"].update(replicas=2), "sets its replicas itself"),
    (port_problems, "Service/safety", lambda d: d["spec"]["ports"][0].update(targetPort="htp"), "no port htp"),
    (port_problems, GATEWAY, lambda d: container(d)["livenessProbe"]["httpGet"].update(port="htp"), "asks port htp"),
    (port_problems, GATEWAY, lambda d: variable(d, "FEDWARD_GATEWAY_SAFETY_URL").update(value="http://safety:8100"),
     "no service safety:8100"),
    (volume_problems, GATEWAY, lambda d: spec(d)["volumes"].pop(), "no volume tmp"),
    (volume_problems, GATEWAY, lambda d: container(d)["volumeMounts"].pop(), "never mounted"),
    (reference_problems, GATEWAY, lambda d: spec(d).update(serviceAccountName="nobody"), "no ServiceAccount/nobody"),
    (reference_problems, "PersistentVolumeClaim/runs", lambda d: d["metadata"].update(name="run"), "no claim runs"),
    (reference_problems, "Secret/gateway", lambda d: d["data"].pop("audit.key"), "no key audit.key"),
    (reference_problems, "Secret/gateway", lambda d: d["data"].pop("audit-url"), "no key audit-url"),
    (reference_problems, "ConfigMap/run", lambda d: d["metadata"].update(name="runs"), "no ConfigMap/run-"),
    (quantity_problems, GATEWAY, lambda d: container(d)["resources"]["limits"].update(memory="200Mx"), "no quantity"),
    (quantity_problems, GATEWAY, lambda d: container(d)["resources"]["limits"].update(memory="1Mi"), "than its limit"),
    (quantity_problems, GATEWAY, lambda d: container(d).pop("resources"), "needs requests"),
    (quantity_problems, GATEWAY, lambda d: spec(d)["volumes"][-1].update(emptyDir={}), "needs a sizeLimit"),
    (hardening_problems, GATEWAY, lambda d: spec(d).update(automountServiceAccountToken=True), "gets a token"),
    (hardening_problems, GATEWAY, lambda d: spec(d).pop("enableServiceLinks"), "service links are on"),
    (hardening_problems, GATEWAY, lambda d: spec(d)["securityContext"].update(runAsUser=0), "runAsUser"),
    (hardening_problems, GATEWAY, lambda d: spec(d).update(hostNetwork=True), "hostNetwork is set"),
    (hardening_problems, TRAINING, lambda d: container(d)["securityContext"].pop("readOnlyRootFilesystem"), "readOnly"),
    (hardening_problems, TRAINING, lambda d: container(d)["securityContext"].update(capabilities={}), "capabilities"),
    (probe_problems, GATEWAY, lambda d: container(d).pop("readinessProbe"), "no readinessProbe"),
    (image_problems, GATEWAY, lambda d: container(d).update(image="localhost/fedward/gateway"), "no fixed version"),
    (image_problems, GATEWAY, lambda d: container(d).update(image="localhost/fedward/gateway:latest"), "no fixed"),
    (image_problems, GATEWAY, lambda d: container(d).update(image="localhost/fedward/gate:1"), "does not build"),
    (setting_problems, GATEWAY, lambda d: variable(d, "FEDWARD_GATEWAY_AUTH").update(name="FEDWARD_GATEWAY_AUHT"),
     "GatewaySettings has no auht"),
    (setting_problems, GATEWAY, lambda d: variable(d, "FEDWARD_GATEWAY_AUTH").update(value="kyes"), "auth"),
    (setting_problems, GATEWAY, lambda d: container(d)["env"].remove(variable(d, "FEDWARD_GATEWAY_KEYS_FILE")),
     "needs keys_file"),
    (setting_problems, GATEWAY, lambda d: container(d)["ports"][0].update(containerPort=8081), "listens on 8080"),
    (setting_problems, GATEWAY, lambda d: variable(d, "FEDWARD_GATEWAY_HOST").update(value="127.0.0.1"), "no other"),
    (file_problems, GATEWAY, lambda d: spec(d)["volumes"][1]["secret"]["items"].pop(), "finds no /etc/fedward/secret"),
    (file_problems, "ConfigMap/coordinator", lambda d: d["data"].update(
        {"coordinator.toml": d["data"]["coordinator.toml"].replace("fedward.fab", "fab")}), "finds no"),
    (alert_problems, "PrometheusRule/fedward",
     lambda d: d["spec"]["groups"][0]["rules"][0].update(expr="fedward_gone_total > 0"), "nothing exports"),
    (alert_problems, "HorizontalPodAutoscaler/safety",
     lambda d: d["spec"]["metrics"][0]["pods"]["metric"].update(name="fedward_gone"), "nothing exports"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "document", "change", "finding"), BROKEN)
def test_check_finds_what_is_broken(check: Check, document: str, change: Break, finding: str) -> None:
    assert finding in " ".join(check(broken(document, change)))


WRONG: list[tuple[str, Break, str]] = [
    (GATEWAY, lambda d: container(d).update(imagePullpolicy="Never"), "imagePullpolicy"),
    (GATEWAY, lambda d: d.update(apiVersion="extensions/v1beta1"), "has no Deployment in extensions/v1beta1"),
    (GATEWAY, lambda d: variable(d, "FEDWARD_GATEWAY_AUTH").update(value=1), "not of type"),
    ("PodDisruptionBudget/gateway", lambda d: d.update(apiVersion="policy/v1beta1"), "has no PodDisruptionBudget"),
    ("Service/gateway", lambda d: d["spec"]["ports"][0].update(targetport="http"), "targetport"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("document", "change", "finding"), WRONG)
def test_schema_finds_what_kubernetes_would_refuse(document: str, change: Break, finding: str, version: str) -> None:
    problems = [problem for d in broken(document, change) for problem in schema_problems(d, version)]
    assert finding in " ".join(problems)


def test_schema_finds_every_error_of_a_document() -> None:
    def change(document: Document) -> None:
        document["spec"]["one"] = document["spec"]["ports"][0]["two"] = True

    problems = [p for d in broken("Service/gateway", change) for p in schema_problems(d, VERSIONS[0])]
    assert len(problems) == 2


def test_metrics_finds_a_label_that_a_series_does_not_have() -> None:
    assert list(expression_problems("x", 'fedward_gateway_decisions_total{result="refuse"}'))
    assert list(expression_problems("x", "fedward_gateway_check_seconds > 1"))  # a histogram has no series of its name
    assert not list(expression_problems("x", 'fedward_gateway_decisions_total{outcome="refuse",pod="a"}'))


def without(policy: str) -> set[tuple[str, str, int]]:
    return edges([document for document in installation("coordinator") if name(document) != f"NetworkPolicy/{policy}"])


def test_network_without_the_default_deny_is_open() -> None:
    assert ("stranger", "inference", 8103) not in edges(installation("coordinator"))
    opened = broken("NetworkPolicy/inference", lambda d: d["spec"]["ingress"].append({}))
    assert ("stranger", "inference", 8103) in edges(opened)
    assert ("inference", "internet", 443) in without("default-deny")


def test_network_without_a_policy_is_closed() -> None:
    lost = edges(installation("coordinator")) - without("gateway")
    assert ("gateway", "safety", 8101) in lost
    assert ("internet", "gateway", 8080) in lost


def test_silo_that_may_go_anywhere_is_noticed() -> None:
    documents = copy.deepcopy(installation("silo"))
    policy = next(d for d in documents if name(d) == "NetworkPolicy/supernode")
    policy["spec"]["egress"][0]["to"][0]["ipBlock"]["cidr"] = "0.0.0.0/0"
    assert ("supernode", "internet", 9092) in edges(documents) - edges(installation("silo"))


@pytest.mark.parametrize(("text", "number"), [("500m", 0.5), ("2", 2.0), ("1Ki", 1024.0), ("1.5Gi", 1.5 * 1024**3)])
def test_quantity(text: str, number: float) -> None:
    assert amount(text) == number
    assert amount(f"{text}x") is None
