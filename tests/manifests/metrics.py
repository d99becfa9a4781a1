"""The metrics that the code exports, and those that alerts, dashboards and autoscalers ask for."""

import ast
import functools
import re
from collections.abc import Iterator

from tests.manifests.render import ROOT, Document, name, of_kind

SUFFIXES = {"Counter": ("",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
# What Prometheus adds to every series of a pod, and what PromQL's histograms have.
ADDED = {"namespace", "pod", "job", "le"}
METRIC = re.compile(r"\b(fedward_[a-z_]+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')


@functools.cache
def exported() -> dict[str, frozenset[str]]:
    """Every series that the code makes, with the names of its labels."""
    found: dict[str, frozenset[str]] = {}
    for package in ("gateway", "services"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SUFFIXES:
                    found |= _series(node, node.func.id)
    proxy = (ROOT / "deploy/fleet-proxy.cfg").read_text()
    return found | {series: frozenset() for series in re.findall(r"fedward_\w+", proxy)}


def _series(node: ast.Call, kind: str) -> dict[str, frozenset[str]]:
    first = node.args[0] if node.args else None
    if not (isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.startswith("fedward_")):
        return {}
    lists = [ast.literal_eval(argument) for argument in node.args[2:] if isinstance(argument, ast.List)]
    return {f"{first.value}{suffix}": frozenset(*lists) for suffix in SUFFIXES[kind]}


def expression_problems(where: str, expression: str) -> Iterator[str]:
    """Series, and labels of them, that no code exports."""
    for series, matchers in METRIC.findall(expression):
        if series not in exported():
            yield f"{where}: nothing exports {series}"
            continue
        unknown = set(MATCHER.findall(matchers)) - exported()[series] - ADDED
        yield from (f"{where}: {series} has no label {label}" for label in sorted(unknown))


def alert_problems(documents: list[Document]) -> Iterator[str]:
    """Alerts and autoscalers that ask for what nothing exports."""
    for rule in of_kind(documents, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for alert in group["rules"]:
                yield from expression_problems(alert["alert"], alert["expr"])
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] == "Pods":
                yield from expression_problems(name(scaler), metric["pods"]["metric"]["name"])
