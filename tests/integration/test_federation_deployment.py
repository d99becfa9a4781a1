"""Runs in Flower's deployment runtime: real processes, TLS, registered keys; and what a crash of each of them costs."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from stack.federation.coordinator import cli_home
from stack.federation.flower import CONNECTION, flower
from stack.toml import write_toml
from tests.fakes.federation import Federation, rounds_of, running_federation, wait_for
from tests.fakes.recorder import Recorder
from tests.fakes.trainer_runs import ROOT
from trainer.bundle import stage_app
from trainer.records import RoundRecord
from trainer.registry import read_adapter

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]
WORK = {"rounds": 2, "local_epochs": 5, "batch_size": 4}  # rounds long enough to be hit in the middle


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Recorder]]:
    with running_federation(tmp_path_factory.mktemp("federation")) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(parties: tuple[Federation, Recorder]) -> list[RoundRecord]:
    """The run that every other is compared with."""
    return parties[0].train("undisturbed", **WORK)


def test_no_text_of_a_silo_reaches_the_coordinator(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord]
) -> None:
    federation, recorder = parties
    adapter = read_adapter(federation.plan.out / "undisturbed" / "run" / "adapters" / "round-1")[0]
    assert recorder.total() > 2 * len(undisturbed) * sum(array.nbytes for array in adapter.values())
    assert recorder.find(federation.sentences()) == []
    # The same search finds what a client sends that was made to leak: one prompt of its shard.
    recorder.clear()
    federation.leak()
    federation.train("leaky", rounds=1)
    federation.make_bundle()
    leaked = recorder.find(federation.sentences())
    prompts = [federation.pairs()[0]["prompt"], federation.pairs()[12]["prompt"]]
    assert leaked
    assert all(any(piece in prompt for prompt in prompts) for piece in leaked)
    assert recorder.find(prompts) == leaked


def test_simulation_gives_the_same_adapter(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord], tmp_path: Path
) -> None:
    federation, _ = parties
    values = federation.plan.run_values() | {key.replace("_", "-"): value for key, value in WORK.items()}
    shards = federation.plan.out.resolve() / "silo-{shard}" / "shard.jsonl"
    run = write_toml(
        tmp_path / "run.toml",
        values | {"silo-data": False, "shard-data": str(shards), "run-dir": str(tmp_path / "run")},
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "run", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashes(rounds_of(tmp_path / "run")) == hashes(undisturbed)


@pytest.mark.parametrize(
    "victim",
    [("flwr-serverapp",), ("flower-superlink",), ("flower-supernode", "silo-1"), ("flwr-clientapp",)],
    ids=["ServerApp", "SuperLink", "SuperNode", "ClientApp"],
)
def test_run_survives_a_kill_in_the_middle_of_a_round(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord], victim: tuple[str, ...]
) -> None:
    federation, _ = parties
    name = f"crash-{victim[0].rpartition('-')[2]}"  # its folder must not have the victim's name
    process, run_dir = federation.start_training(name, **WORK)
    wait_for(lambda: len(rounds_of(run_dir)) == 1, "first round")
    first = rounds_of(run_dir)
    wait_for(lambda: federation.find("flwr-clientapp"), "client at work in the second round")
    federation.kill(*victim)
    assert process.wait(900) == 0, federation.log(f"train-{name}")
    records = rounds_of(run_dir)
    assert records[:1] == first  # finished rounds are not done again
    assert [record.rejected for record in records] == [{}, {}]
    assert hashes(records) == hashes(undisturbed)


def start_and_wait_for_the_second_round(federation: Federation, name: str) -> tuple["subprocess.Popen[bytes]", Path]:
    """A run that has one round on disk and clients at work in the next."""
    process, run_dir = federation.start_training(name, **WORK)
    wait_for(lambda: len(rounds_of(run_dir)) == 1, "first round")
    wait_for(lambda: federation.find("flwr-clientapp"), "client at work in the second round")
    return process, run_dir


def check_end(
    process: "subprocess.Popen[bytes]", federation: Federation, run_dir: Path, undisturbed: list[RoundRecord]
) -> None:
    assert process.wait(900) == 0, federation.log(f"train-{run_dir.parent.name}")
    records = rounds_of(run_dir)
    assert [record.rejected for record in records] == [{}, {}]
    assert hashes(records) == hashes(undisturbed)


def test_run_survives_the_end_of_a_silos_machine(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord]
) -> None:
    federation, _ = parties
    process, run_dir = start_and_wait_for_the_second_round(federation, "machine-silo")
    federation.kill_machine("silo-1")
    federation.start_silo(1)
    check_end(process, federation, run_dir, undisturbed)


@pytest.mark.parametrize("database", ["kept", "damaged"])
def test_run_survives_the_end_of_the_coordinators_machine(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord], database: str
) -> None:
    federation, _ = parties
    name = f"machine-{database}"
    process, run_dir = start_and_wait_for_the_second_round(federation, name)
    first = rounds_of(run_dir)
    process.kill()
    process.wait()
    federation.kill_machine("coordinator")
    if database == "damaged":
        damage_and_replace_the_database(federation)
    federation.start_coordinator()
    if database == "damaged":
        federation.register()
    process, run_dir = federation.start_training(name, **WORK)
    check_end(process, federation, run_dir, undisturbed)
    assert rounds_of(run_dir)[:1] == first


def damage_and_replace_the_database(federation: Federation) -> None:
    """What happens to a SuperLink's database, and what its keeper does about it when he has read why it fails."""
    state = federation.coordinator.state_dir
    for file in state.glob("superlink.db*"):
        file.unlink()
    (state / "superlink.db").write_bytes(b"no database" * 1000)
    federation.start_coordinator()
    wait_for(lambda: "superlink.db is damaged" in federation.log("coordinator"), "word of the damage", 120)
    federation.kill_machine("coordinator")
    (state / "superlink.db").rename(state / "damaged.db")


def test_command_that_is_killed_and_started_again_finds_its_run(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord]
) -> None:
    """Its ServerApp lives on meanwhile, and must neither work beside the next one nor spoil its result."""
    federation, _ = parties
    process, run_dir = start_and_wait_for_the_second_round(federation, "command")
    process.kill()
    process.wait()
    process, run_dir = federation.start_training("command", **WORK)
    check_end(process, federation, run_dir, undisturbed)


def test_run_survives_a_database_that_is_locked_for_longer_than_flower_waits(
    parties: tuple[Federation, Recorder], undisturbed: list[RoundRecord]
) -> None:
    federation, _ = parties
    process, run_dir = start_and_wait_for_the_second_round(federation, "locked")
    database = sqlite3.connect(federation.coordinator.state_dir / "superlink.db", timeout=30, isolation_level=None)
    with closing(database):
        database.execute("BEGIN EXCLUSIVE")
        wait_for(lambda: "superlink.db is locked" in federation.log("coordinator"), "word of the lock", 120)
        database.execute("ROLLBACK")
    check_end(process, federation, run_dir, undisturbed)


def test_silo_without_its_data_costs_its_rounds_only(parties: tuple[Federation, Recorder]) -> None:
    federation, _ = parties
    shard = federation.plan.shard(1)
    shard.rename(shard.with_suffix(".away"))
    try:
        (record,) = federation.train("without-data", rounds=1, min_clients=1)
    finally:
        shard.with_suffix(".away").rename(shard)
    assert record.accepted == [0]
    assert record.rejected == {1: f"client 1: {shard.resolve()}: cannot be read: No such file or directory"}


def test_bundle_that_nobody_trusted_has_signed_runs_on_no_silo(parties: tuple[Federation, Recorder]) -> None:
    """Whoever reaches the Control API, here the coordinator itself, still cannot run code in a silo."""
    federation, _ = parties
    folder = federation.plan.out / "unsigned"
    stage_app(ROOT, folder / "app")
    values = federation.plan.run_values() | {"run-dir": str(folder / "run"), "rounds": 1}
    run = write_toml(folder / "run.toml", values)
    command = flower(
        "flwr", cli_home(federation.coordinator), "run", folder / "app", CONNECTION, "--stream", "--run-config", run
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ)
    assert "The FAB could not be verified" in done.stdout
    assert not (folder / "run" / "rounds.jsonl").exists()


def hashes(records: list[RoundRecord]) -> list[str]:
    return [record.adapter_sha256 for record in records]
