"""Every metric stands in docs/observability.md, and nothing else does."""

import ast
import re

from tests.meta.test_import_layers import ROOT, modules

KINDS = ("Counter", "Gauge", "Histogram")


def test_document_names_exactly_the_metrics_that_there_are() -> None:
    declared = {
        node.args[0].value
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS
        if node.args and isinstance(node.args[0], ast.Constant)
    }
    table = (ROOT / "docs/observability.md").read_text().split("## Metrics")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == declared
