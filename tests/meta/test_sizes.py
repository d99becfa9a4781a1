"""Files and functions stay small enough to read."""

import ast
import statistics
from pathlib import Path

import pytest

from tests.meta.test_import_layers import ROOT, module_name, modules

MAIN_PATHS = {
    "gateway/pipeline.py",
    "evaluation/run.py",
    "services/critique/revise.py",
    "trainer/server_app.py",
    "stack/demo.py",
}


def lines(text: str) -> int:
    return len(text.splitlines())


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_module_and_functions_are_short_and_described(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert lines(text) <= 500, "a module has at most 500 lines"
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines; at most 80"


def test_median_module_is_under_200_lines() -> None:
    assert statistics.median(lines(path.read_text()) for path in modules()) < 200


@pytest.mark.parametrize("path", sorted(MAIN_PATHS))
def test_main_paths_stand_where_the_readme_says(path: str) -> None:
    assert (ROOT / path).is_file()
