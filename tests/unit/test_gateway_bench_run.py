"""A quick run of the whole benchmark with the peers that need no installation, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.bench import install, processes
from gateway.bench.__main__ import read_options
from gateway.bench.install import litellm, portkey
from gateway.bench.processes import PeerFailed, running
from tests.meta.test_import_layers import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
BENCH = [sys.executable, "-m", "gateway.bench", "--quick"]
PYTHON = ["--python", sys.executable]  # nothing is installed


def wait_until(condition: Any, what: str) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "gateway.json"
    command = [*BENCH, "--peers", "fedward,fastapi_httpx", *PYTHON, "--out", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    assert "| fastapi_httpx |" in done.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.long
def test_the_agreed_keys_are_there(figures: dict[str, Any]) -> None:
    for peer in ("fedward", "fastapi_httpx"):
        assert figures["peers"][peer]["rss_mb"] > 10
        assert "cpu_ms_per_request" in figures["guarded"][peer]
        assert "cpu_ms_per_stream" in figures["stream"][peer]
        assert "characters_leaked" in figures["leak"][peer]
        assert {"classifier_down", "answer_check_500", "upstream_500_stream"} <= figures["fault"][peer].keys()
    assert figures["guarded"]["fastapi_httpx"]["cpu_ms_per_request"] > 0
    assert figures["schema_version"] == 1
    assert figures["command"].startswith("python -m gateway.bench --quick --peers fedward,fastapi_httpx")


@pytest.mark.long
def test_our_gateway_leaks_nothing_and_what_people_write_does(figures: dict[str, Any]) -> None:
    ours, theirs = figures["leak"]["fedward"], figures["leak"]["fastapi_httpx"]
    assert {mode: found["characters_leaked"] for mode, found in ours["modes"].items()} == dict.fromkeys(
        ours["modes"], 0
    )
    assert theirs["modes"]["stream"]["characters_leaked"] > 200, "it checks a stream at its end"
    assert theirs["modes"]["whole"]["characters_leaked"] == 0


@pytest.mark.long
def test_our_gateway_passes_no_unsafe_text_in_any_fault(figures: dict[str, Any]) -> None:
    cases = figures["fault"]["fedward"]
    assert not [name for name, case in cases.items() if case.get("unsafe_text_passed")]
    assert cases["classifier_down"]["status"] == 503
    assert cases["client_leaves_stream"]["generation_cancelled"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [*BENCH, "--peers", "fastapi_httpx", *PYTHON, "--out", str(tmp_path / "gateway.json")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        process = psutil.Process(bench.pid)
        wait_until(lambda: len(process.children()) == 2, "the mock services and the peer did not start")
        started = process.children(recursive=True)
        bench.send_signal(number)
        assert bench.wait(60) == 128 + number
    wait_until(lambda: not any(one.is_running() for one in started), "a process was left behind")
    assert not (tmp_path / "gateway.json").exists()


def test_ending_a_peer_ends_what_it_started_even_what_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "END_SECONDS", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {deaf!r}]); time.sleep(60)"
    log = tmp_path / "log"
    with running([sys.executable, "-c", parent], {}, tmp_path, log, None) as process:
        wait_until(lambda: "deaf" in log.read_text(), "the child did not start")
        family = [process, *process.children()]
        assert len(family) == 2
    wait_until(lambda: not any(one.is_running() for one in family), "a process was left behind")


def test_peer_gets_no_variable_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    log = tmp_path / "log"
    show = "import json, os; print(json.dumps(dict(os.environ)), flush=True)"
    with running([sys.executable, "-c", show], {"PEER": "1"}, tmp_path, log, None):
        wait_until(lambda: log.read_text().endswith("\n"), "it did not print")
    shown = json.loads(log.read_text())
    assert shown["PEER"] == "1"
    assert "SOME_TOKEN" not in shown


def test_command_that_does_not_exist_is_a_failed_peer(tmp_path: Path) -> None:
    peer = running(["no-such-command"], {}, tmp_path, tmp_path / "log", None)
    with pytest.raises(PeerFailed, match="cannot start no-such-command"), peer:
        pass


def test_without_npm_portkey_is_a_failed_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerFailed, match="npm is not installed"):
        portkey(tmp_path)


def test_failed_installation_is_a_failed_peer_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        echo 'no such version' >&2
        exit 3
        """)
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for _ in range(2):
        with pytest.raises(PeerFailed, match="ended with 3: no such version"):
            portkey(tmp_path / "cache")


def test_complete_installation_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_run", lambda _: pytest.fail("it installs again"))
    folder = tmp_path / f"litellm-{install.LITELLM}"
    folder.mkdir()
    (folder / "complete").touch()
    assert litellm(tmp_path) == folder / "bin/litellm"


def test_unknown_peer_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(["--peers", "fedward,nobody"])
    assert "no peer nobody; there are fedward, fastapi_httpx, litellm, portkey" in capsys.readouterr().err
