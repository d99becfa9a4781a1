"""What the README and the documents name exists."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.meta.test_import_layers import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)")


def reading_order() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Reading the code")[1].split("##")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.M)


def test_reading_order_is_numbered_and_every_path_exists() -> None:
    paths = reading_order()
    assert len(paths) >= 8
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not broken


def test_make_targets_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`?make ([a-z0-9-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert named <= targets | {"help"}


def test_help_lists_every_documented_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "up", "down", "miniature", "safety-model"):
        assert re.search(rf"^  {target} ", shown, flags=re.M)
