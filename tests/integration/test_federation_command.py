"""``make federation``'s own command: to its end, with nothing left of it but its results."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from services.contracts.adapters import read_manifest
from services.contracts.errors import ConfigError
from stack.federation.network import NAMESPACES, may_separate
from tests.fakes.trainer_runs import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]


def run(mark: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stack.federation", "demo", *flags]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=os.environ | {"TEST_MARK": mark}
    )


def carrying(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_command_runs_a_federation_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mark, out = uuid.uuid4().hex, tmp_path / "federation"
    before = {path.name for path in NAMESPACES.glob("*")}
    done = run(mark, "--out", str(out), "--silos", "2", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["separate_networks"] == (may_separate() is None)
    (record,) = summary["rounds"]
    assert record["accepted"] == [0, 1]
    assert record["curation"]["total"] == 2 * (24 + 8)  # each silo's own safety service saw its shard
    assert read_manifest(Path(summary["adapter"])).sha256 == summary["adapter_sha256"] == record["adapter_sha256"]
    assert carrying(mark) == []
    assert {path.name for path in NAMESPACES.glob("*")} <= before

    again = run(mark, "--out", str(out))
    assert again.returncode == ConfigError.exit_code
    assert f"{out} holds a finished federation" in again.stderr
