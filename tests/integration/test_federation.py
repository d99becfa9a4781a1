"""Federations by ``flwr run`` in Flower's simulation runtime, with real service processes and the shipped models."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.common.ports import free_port
from services.contracts.adapters import read_manifest
from services.contracts.errors import ConfigError
from stack.processes import Processes, Service
from tests.fakes.trainer_runs import ROOT, write_data
from trainer.config import RunValue
from trainer.records import RoundRecord
from trainer.registry import read_adapter
from trainer.run_folder import read_result
from trainer.simulation import HOME_PREFIX, OWNER, Simulation

PATIENCE_SECONDS = 280.0  # a run takes about 20 s on two idle cores
pytestmark = pytest.mark.timeout(600)


class Run:
    """One ``python -m trainer run``, with everything that it starts marked in the environment."""

    def __init__(self, folder: Path, **changes: RunValue | Path) -> None:
        self.mark = uuid.uuid4().hex
        self.run_dir = folder / "run"
        self._log = folder / "trainer.log"
        settings: dict[str, RunValue | Path] = {
            "run_dir": self.run_dir, "num_clients": 2, "clients_per_round": 2, "rounds": 2, "samples_per_client": 8,
            "min_clients": 1, "harmful_share": 0.25, **write_data(folder),
        }  # fmt: skip
        lines = [f"{key.replace('_', '-')} = {_toml(value)}" for key, value in (settings | changes).items()]
        self._config = folder / "run.toml"
        self._config.write_text("\n".join(lines) + "\n")

    def start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "trainer", "run", str(self._config)],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TEST_MARK": self.mark},
            )  # fmt: skip

    def finish(self) -> int:
        """Run to the end; gives the exit code."""
        process = self.start()
        try:
            return process.wait(PATIENCE_SECONDS)
        finally:
            stop(process)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def rounds(self) -> list[RoundRecord]:
        file = self.run_dir / "rounds.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [RoundRecord.model_validate_json(line) for line in lines]

    def has_more_than(self, rounds: int) -> bool:
        return len(self.rounds()) > rounds

    def processes(self) -> list[psutil.Process]:
        """What is still running of all that this run started, at any depth."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def _toml(value: RunValue | Path) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


def stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait_for(condition: Callable[[], Any], what: str, process: "subprocess.Popen[bytes]") -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, f"the run ended with {process.returncode} before its {what}"
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {PATIENCE_SECONDS:g} s")


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunValue | Path]]:
    """The three services as processes; gives the run-config keys that name them."""
    started = {name: Service(name, f"services.{name}", free_port()) for name in ("safety", "critique", "inference")}
    with Processes(tmp_path_factory.mktemp("services")) as processes:
        processes.start_services(list(started.values()))
        yield {
            "safety_url": started["safety"].url,
            "inference_url": started["inference"].url,
            "coordinator_critique_url": started["critique"].url,
        }


def test_two_clients_two_rounds_with_filter_and_constitution(
    tmp_path: Path, services: dict[str, RunValue | Path]
) -> None:
    run = Run(
        tmp_path, arm="filter+cai", cai_steps=4, cai_prompts=6, cai_benign_prompts=2, cai_answer_tokens=24, **services
    )
    assert run.finish() == 0, run.log()

    records = run.rounds()
    assert [record.round_number for record in records] == [1, 2]
    for record in records:
        arrays, manifest = read_adapter(run.run_dir / "adapters" / f"round-{record.round_number}")
        assert manifest.sha256 == record.adapter_sha256
        assert manifest.base_model_id == "fedward-miniature"
        assert manifest.filter_model_id
        assert record.accepted == [0, 1]
        assert record.bytes_up == record.bytes_down == 2 * sum(array.nbytes for array in arrays.values())
        assert record.curation is not None
        assert record.curation.total == 16
        assert record.curation.kept + record.curation.dropped == 16
        assert record.cai is not None
        assert record.cai.drafts == 6
        assert record.cai.revised + record.cai.no_problem + record.cai.rejected == 6
        assert manifest.constitution_sha256 == record.cai.constitution_sha256
        lines = (run.run_dir / "cai" / f"round-{record.round_number}.jsonl").read_text().splitlines()
        assert len(lines) == 6 + 2
        assert {json.loads(line)["revision"]["critique"]["constitution_sha256"] for line in lines} == {
            record.cai.constitution_sha256
        }
    assert "round 2/2 [filter+cai]: 2 of 2 clients" in run.log()
    assert {path.name for path in (run.run_dir / "adapters").iterdir()} == {"round-0", "round-1", "round-2"}
    assert run.processes() == []


def test_client_that_dies_mid_round_costs_that_round_one_client(tmp_path: Path) -> None:
    run = Run(tmp_path, arm="none", rounds=3, local_epochs=60)
    process = run.start()
    try:

        def busy_worker() -> psutil.Process | None:
            titles = ((found, found.cmdline()[:1]) for found in run.processes())
            return next((found for found, title in titles if title == ["ray::ClientAppActor.run"]), None)

        wait_for(run.rounds, "first round", process)
        wait_for(busy_worker, "training client", process).kill()
        assert process.wait(PATIENCE_SECONDS) == 0, run.log()
    finally:
        stop(process)
    records = run.rounds()
    assert [len(record.accepted) for record in records] in ([2, 1, 2], [2, 2, 1])
    (hurt,) = [record for record in records if record.rejected]
    ((client, reason),) = hurt.rejected.items()
    assert reason.startswith(f"client {client}: <class 'ray.exceptions.Actor")
    assert run.processes() == []


def test_interrupted_and_killed_run_stops_everything_and_is_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path, arm="none", rounds=5, local_epochs=30)
    done: list[RoundRecord] = []
    for end, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = run.start()
        try:
            wait_for(partial(run.has_more_than, len(done)), "next round", process)
            process.send_signal(end)
            assert process.wait(60) == code
        finally:
            stop(process)
        # A killed process cannot clean up: its guard does, just after.
        assert end == signal.SIGINT or wait_until(lambda: not run.processes())
        assert run.processes() == []
        assert run.rounds()[: len(done)] == done
        done = run.rounds()
        assert len(done) < 5

    assert run.finish() == 0, run.log()
    assert run.rounds()[: len(done)] == done
    assert [record.round_number for record in run.rounds()] == [1, 2, 3, 4, 5]
    assert f"after round {len(done)}" in run.log()
    result = read_result(run.run_dir)
    assert result is not None
    assert result.adapter is not None
    assert read_manifest(Path(result.adapter)).sha256 == result.adapter_sha256 == run.rounds()[-1].adapter_sha256


def test_home_of_a_simulation_that_was_killed_with_its_guard_is_removed_by_the_next(tmp_path: Path) -> None:
    orphan, living = (Path(tempfile.mkdtemp(prefix=HOME_PREFIX, dir="/tmp")) for _ in range(2))
    (orphan / OWNER).touch()
    with Simulation(ROOT, tmp_path / "superlink.log") as simulation, (living / OWNER).open("wb") as file:
        assert not orphan.exists()
        fcntl.flock(file, fcntl.LOCK_EX)
        with Simulation(ROOT, tmp_path / "second.log"):
            assert living.exists()
            assert simulation._home.exists()
    shutil.rmtree(living)


def test_failed_run_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "empty-model").mkdir()
    run = Run(tmp_path, arm="none", base_model=tmp_path / "empty-model")
    assert run.finish() == ConfigError.exit_code, run.log()
    assert f"base-model {tmp_path / 'empty-model'}: cannot be loaded" in run.log()
    assert run.processes() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('arm = "none"\nharmful-shar = 0.5\n', "unknown run-config key 'harmful-shar'; did you mean 'harmful-share'?"),
        ('arm = "both"\n', "arm: Input should be 'none'"),
        ("arm = none\n", "not valid TOML"),
    ],
)
def test_bad_configuration_is_refused_before_anything_starts(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith(f"error: {config}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
