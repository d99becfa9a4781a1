"""``up``, ``down`` and ``demo`` as commands, over real processes."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from services.common.ports import free_port
from services.contracts.adapters import read_manifest
from services.contracts.errors import AdapterError, ConfigError
from stack.marks import VARIABLE, kill_marked, marked, new_mark
from stack.plan import ARMS
from stack.processes import ProcessFailed, port_is_free
from tests.fakes.stack_standin import SLEEP
from tests.fakes.trainer_runs import make_config, write_data
from tests.meta.test_import_layers import ROOT
from trainer.model import adapter_config_json, load_trainee
from trainer.registry import write_adapter
from trainer.server_app import manifest_fields

INTERRUPTED = 130
NAMES = ("gateway", "safety", "critique", "inference")
PATIENCE_SECONDS = 60.0
LAUNCH = """
import sys
import stack.up
from stack import processes
stack.up.GATEWAY_PORT, stack.up.SAFETY_PORT, stack.up.CRITIQUE_PORT, stack.up.INFERENCE_PORT = {ports}
{change}
from stack.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
STANDINS = """
processes.STOP_SECONDS = 0.4
def standins(*ports):
    return [processes.Service(n, "tests.fakes.stack_standin", p, {flags!r}) for n, p in zip({names!r}, ports)]
stack.up.gateway_plan = lambda port, services: standins(port)[0]
stack.up.service_plan = lambda *ports: standins(0, *ports)[1:]
"""


def interruptible() -> None:
    """Signals are what they are in a terminal, even if these tests run in the background of a script."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Stack:
    """``python -m stack`` with ports of its own, and with everything that it starts marked."""

    def __init__(self, folder: Path) -> None:
        self.mark = new_mark()
        self.out = folder / "up"
        self.ports = dict(zip(NAMES, (free_port() for _ in NAMES), strict=True))

    def start(
        self, *arguments: str, change: str = "", prepare: Callable[[], object] = interruptible
    ) -> "subprocess.Popen[str]":
        code = LAUNCH.format(ports=tuple(self.ports.values()), change=change)
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "--out", str(self.out)],
            cwd=ROOT, env=os.environ | {VARIABLE: self.mark}, preexec_fn=prepare,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, change: str = "") -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, change=change)
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def running(self) -> list[int]:
        """The ids of all living processes that were started here."""
        return sorted(process.pid for process in marked(self.mark))


def standins(*flags: str) -> str:
    """The change that puts stand-ins into the services' place, because those take seconds to start."""
    return STANDINS.format(names=NAMES, flags=flags)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    kill_marked(stack.mark)


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


# --- up and down


@pytest.mark.parametrize("name", NAMES)
def test_port_in_use_is_named_with_its_service_and_nothing_is_left(stack: Stack, name: str) -> None:
    with socket.create_server(("127.0.0.1", stack.ports[name])):
        done = stack.run("up", change=standins())
    assert done.returncode == ConfigError.exit_code
    assert done.stderr == (f"error: port {stack.ports[name]} for {name} is in use; stop what listens there first\n")
    assert stack.running() == []


def test_up_twice_and_down_twice(stack: Stack) -> None:
    with subprocess.Popen(SLEEP) as bystander:
        try:
            done = stack.run("up", change=standins("--children"))
            assert done.returncode == 0, done.stderr
            assert f"listens on http://127.0.0.1:{stack.ports['gateway']} and serves the untouched base" in done.stdout
            started = stack.running()
            assert len(started) == 3 * len(NAMES)

            again = stack.run("up", change=standins())
            assert again.returncode == ConfigError.exit_code
            assert again.stderr == f"error: the stack of {stack.out} runs already; `make down` stops it\n"
            assert stack.running() == started

            assert stack.run("down").stdout == f"stopped {len(started)} processes\n"
            assert stack.running() == []
            assert stack.run("down").stdout == f"nothing of {stack.out} was running\n"
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_down_after_everything_has_died_touches_nobody(stack: Stack) -> None:
    assert stack.run("up", change=standins()).returncode == 0
    for process in marked(stack.mark):
        process.kill()
    wait_until(lambda: not stack.running(), "the end of all processes")
    # Whoever may have been given one of the ids since, has not been started by `up`.
    with subprocess.Popen(SLEEP, env=os.environ | {VARIABLE: new_mark()}) as stranger:
        done = stack.run("down")
        assert stranger.poll() is None
        stranger.kill()
    assert (done.returncode, done.stdout) == (0, f"nothing of {stack.out} was running\n")


def test_down_after_up_was_killed_in_the_middle(stack: Stack) -> None:
    process = stack.start("up", change=standins("--unready"))
    wait_until(lambda: len(stack.running()) == 1 + len(NAMES), "all processes")
    process.kill()
    process.communicate()
    assert stack.run("down").stdout == f"stopped {len(NAMES)} processes\n"
    assert stack.running() == []


def test_damaged_mark_stops_nothing_and_is_named(stack: Stack) -> None:
    stack.out.mkdir()
    (stack.out / "mark").write_text("")
    done = stack.run("down")
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith(f"error: {stack.out / 'mark'}: not a mark: ''; ")


def test_up_fails_as_a_whole_when_one_process_ends(stack: Stack) -> None:
    done = stack.run("up", change=standins("--unready", "--end-after", "0.5"))
    assert done.returncode == ProcessFailed.exit_code
    assert done.stderr in {
        f"error: {name} ended with code 3; see {stack.out / name}.log\nerror: a reason to end\n" for name in NAMES
    }
    assert stack.running() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted_up_leaves_nothing_even_when_it_is_interrupted_again(stack: Stack, number: signal.Signals) -> None:
    process = stack.start("up", change=standins("--unready", "--stubborn"))
    wait_until(lambda: not any(port_is_free(port) for port in stack.ports.values()), "all processes at work")
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == INTERRUPTED
    assert stderr.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert stack.running() == []


def test_closed_terminal_is_ignored_under_nohup(stack: Stack) -> None:
    process = stack.start(
        "up", change=standins("--unready"), prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_until(lambda: len(stack.running()) == 1 + len(NAMES), "all processes")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == INTERRUPTED
    assert stack.running() == []


def test_release_that_is_not_there_is_refused_before_anything_starts(stack: Stack, tmp_path: Path) -> None:
    done = stack.run("up", "--release", str(tmp_path / "none"), change=standins())
    assert done.returncode == AdapterError.exit_code
    assert done.stderr.startswith(f"error: --release {tmp_path / 'none'}: no adapter there; ")
    assert not stack.out.exists()


@pytest.mark.parametrize("out", ["file", "file/up"])
def test_folder_that_cannot_be_written_is_named(stack: Stack, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    stack.out = tmp_path / out
    done = stack.run("up", change=standins())
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith(f"error: cannot write to {stack.out}: ")
    assert stack.running() == []


def write_starting_adapter(folder: Path) -> Path:
    """An adapter for the shipped miniature as a federation begins with it, in a release folder."""
    config = make_config(arm="none", run_dir=folder / "run", **write_data(folder))
    trainee = load_trainee(config)
    adapter = folder / "release" / "release-none-round-0"
    provenance = {"round_number": 0, **manifest_fields(trainee, config)}
    write_adapter(adapter, trainee.starting_adapter, adapter_config_json(trainee), provenance)
    return adapter


def test_real_services_serve_a_released_adapter_until_they_are_stopped(stack: Stack, tmp_path: Path) -> None:
    adapter = write_starting_adapter(tmp_path)
    sha256 = read_manifest(adapter).sha256
    done = stack.run("up", "--release", str(adapter))
    assert done.returncode == 0, done.stderr
    assert f"serves the adapter release-none-round-0 (sha256 {sha256[:12]})" in done.stdout

    chat = {"model": "fedward", "messages": [{"role": "user", "content": "Name three uses of honey."}], "max_tokens": 8}
    answer = httpx.post(f"http://127.0.0.1:{stack.ports['gateway']}/v1/chat/completions", json=chat, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["system_fingerprint"] == sha256
    assert answer.json()["choices"][0]["message"]["content"]

    assert stack.run("down").stdout == "stopped 4 processes\n"
    assert stack.running() == []


# --- a full disk


def run_demo(mark: str, out: Path, *arguments: str, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    demo = [sys.executable, "-m", "stack", "demo", "--out", str(out), *arguments]
    return subprocess.Popen(
        [*before, *demo], cwd=ROOT, env=os.environ | {VARIABLE: mark}, preexec_fn=interruptible,
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_demo_that_may_not_write_large_files_names_the_command_and_the_reason(stack: Stack, tmp_path: Path) -> None:
    resource_limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))"
    launch = f"{resource_limit}; import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    process = run_demo(stack.mark, tmp_path / "run", before=[sys.executable, "-c", launch])
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == ProcessFailed.exit_code
    assert stderr.startswith("error: corpus-client-benign ended with code ")
    assert "File too large" in stderr
    assert stack.running() == []


def test_demo_on_a_full_disk_says_so(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    own_disk = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=48k tmpfs {tmp_path / 'disk'}"
    if subprocess.run([*own_disk, mount], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk for a test")
    process = run_demo(stack.mark, tmp_path / "disk" / "run", before=[*own_disk, f'{mount}; exec "$0" "$@"'])
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == ProcessFailed.exit_code
    assert stderr.startswith("error: corpus-client-benign ended with code ")
    assert "No space left on device" in stderr or "is full" in stderr
    assert stack.running() == []


# --- the whole demo

SMALL = ("--rounds", "1", "--clients", "2", "--samples-per-client", "16", "--limit", "10", "--no-release")
DEMO_SECONDS = 900.0


def rounds_of(out: Path, arm: str) -> list[dict[str, object]]:
    file = out / "arms" / arm / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_finished(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", *ARMS}
    assert summary["missing_arms"] == []
    for arm in ARMS:
        (record,) = rounds_of(out, arm)
        assert summary["arms"][arm]["round"] == record["round_number"] == 1
        assert summary["arms"][arm]["advbench"]["n"] == 10
        assert summary["arms"][arm]["bytes_sent"] > 0
    plots = list(out.glob("*.png"))
    assert len(plots) >= 2
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.long
@pytest.mark.timeout(2 * DEMO_SECONDS)
def test_small_demo_from_start_to_end(stack: Stack, tmp_path: Path) -> None:
    process = run_demo(stack.mark, tmp_path / "run", *SMALL)
    stdout, stderr = process.communicate(timeout=DEMO_SECONDS)
    assert process.returncode == 0, stderr
    assert stack.running() == []
    check_finished(tmp_path / "run")
    assert "filter+cai" in stdout
    assert stdout.splitlines()[-1].startswith("done in ")

    again = run_demo(stack.mark, tmp_path / "run", *SMALL)
    _, stderr = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == ConfigError.exit_code
    assert stderr.startswith(f"error: {tmp_path / 'run'} holds a finished demo")


@pytest.mark.long
@pytest.mark.timeout(2 * DEMO_SECONDS)
def test_interrupted_demo_leaves_no_process_and_goes_on(stack: Stack, tmp_path: Path) -> None:
    out = tmp_path / "run"
    points: dict[str, Callable[[], object]] = {
        "the first federation": lambda: rounds_of(out, "clean"),
        "the first evaluation of an arm": lambda: (out / "arms" / "clean" / "eval" / "round-1" / "run.json").exists(),
    }
    for what, reached in points.items():
        process = run_demo(stack.mark, out, *SMALL)
        wait_until(lambda: reached() or process.poll() is not None, what, DEMO_SECONDS)  # noqa: B023  (called at once)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == INTERRUPTED
        assert stderr.splitlines()[-1] == "interrupted; the same command goes on from here"
        assert stack.running() == []
        assert not (out / "summary.json").exists()
    before = {arm: rounds_of(out, arm) for arm in ARMS}
    assert all(before.values())

    process = run_demo(stack.mark, out, *SMALL)
    _, stderr = process.communicate(timeout=DEMO_SECONDS)
    assert process.returncode == 0, stderr
    assert stack.running() == []
    assert {arm: rounds_of(out, arm) for arm in ARMS} == before  # nothing was trained a second time
    check_finished(out)
