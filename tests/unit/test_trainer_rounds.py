"""The round loop with real clients on a tiny model, in one process: bad replies, too few clients, resume."""

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from services.contracts.adapters import AdapterManifest, read_manifest
from services.contracts.errors import AdapterError, ConfigError, UpstreamUnavailable
from tests.fakes.gateway_upstreams import closed_port
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import QUERY, LocalGrid, Tamper, run_values, small_run, train, write_jsonl
from tests.fakes.trainer_services import BAD, FakeServices, trainer_services
from trainer import client_app, run_folder, server_app
from trainer.aggregation import TooFewClients
from trainer.config import RunConfig
from trainer.model import _load
from trainer.records import RoundRecord
from trainer.registry import read_adapter, write_adapter
from trainer.run_folder import RunFolder, read_result
from trainer.server_app import main, train_federation
from trainer.shards import Pair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def services() -> Iterator[FakeServices]:
    with trainer_services() as state:
        yield state


def rounds_of(config: RunConfig) -> list[RoundRecord]:
    lines = (config.run_dir / "rounds.jsonl").read_text().splitlines()
    return [RoundRecord.model_validate_json(line) for line in lines]


def test_run_leaves_an_adapter_and_a_line_for_each_round(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model)
    train(config)
    records = rounds_of(config)
    assert [record.round_number for record in records] == [1, 2]
    first, second = (record.loss for record in records)
    assert first is not None
    assert second is not None
    assert second < first
    for record in records:
        arrays, manifest = read_adapter(config.run_dir / "adapters" / f"round-{record.round_number}")
        assert manifest.sha256 == record.adapter_sha256
        assert (manifest.arm, manifest.round_number) == ("none", record.round_number)
        assert manifest.data_counts["answer_tokens"] == sum(record.client_tokens.values())
        size = sum(array.nbytes for array in arrays.values())
        assert (record.bytes_down, record.bytes_up, record.bytes_sent) == (3 * size, 3 * size, 6 * size)
        assert set(record.seconds_by_phase) == {"train", "aggregate"}
    result = read_result(config.run_dir)
    assert result is not None
    assert (result.status, result.rounds, result.adapter_sha256) == ("completed", 2, records[1].adapter_sha256)


def test_same_seed_gives_the_same_adapter_and_another_seed_does_not(tmp_path: Path, model: Path) -> None:
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_run(tmp_path, model, run_dir=tmp_path / name, seed=seed, rounds=1)
        train(config)
        hashes.append(rounds_of(config)[0].adapter_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def poison(question: Message, reply: Message) -> Message:
    arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
    next(iter(arrays.values()))[0, 0] = np.nan
    reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return reply


def boast(question: Message, reply: Message) -> Message:
    reply.content.metric_records["metrics"]["num-tokens"] = 10**9
    return reply


def nothing(question: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=question)


def send_bytes(data: bytes) -> Tamper:
    """The client's arrays become these bytes."""

    def tamper(question: Message, reply: Message) -> Message:
        arrays = reply.content.array_records["arrays"]
        fake = {name: Array(array.dtype, tuple(array.shape), array.stype, data) for name, array in arrays.items()}
        reply.content["arrays"] = ArrayRecord(fake)
        return reply

    return tamper


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def owe_data(question: Message, reply: Message) -> Message:
    reply.content.metric_records["metrics"]["loss"] = -1.0
    return reply


def node_gone(question: Message, reply: Message) -> Message:
    """What the SuperLink itself replies when a node no longer reports; it names no client."""
    return create_message_error_unavailable_res_message(question.metadata, "node_unavail")


def crash(question: Message, reply: Message) -> Message:
    return Message(Error(0, "<class 'ActorDiedError'>: the worker died\ntraceback"), reply_to=question)


def silent(question: Message, reply: Message) -> None:
    return None


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (poison, "client 1: parameter .* holds NaN or infinity"),
        (boast, r"client 1: num-tokens is 1e\+09"),
        (nothing, "client 1: the reply cannot be read"),
        (crash, "client 1: <class 'ActorDiedError'>: the worker died"),
        (silent, "client 1: no answer within round-timeout-seconds"),
        (node_gone, "client 1: Error: Node Unavailable"),
        (send_bytes(b""), "client 1: the reply cannot be read: EOFError"),
        (send_bytes(b"\x93NUMPY\x01\x00"), "client 1: the reply cannot be read"),
        (send_bytes(pickle.dumps([1])), "client 1: the reply cannot be read: .*pickle"),
        (send_bytes(npz_bytes()), "client 1: the reply cannot be read: TypeError: a NpzFile"),
        (owe_data, "client 1: loss is -1"),
    ],
)
def test_bad_reply_costs_its_client_the_round_and_no_more(
    tmp_path: Path, model: Path, tamper: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config, tamper={1: tamper})
    (record,) = rounds_of(config)
    assert record.accepted == [0, 2]
    assert list(record.rejected) == [1]
    with pytest.raises(AdapterError, match=reason):
        raise AdapterError(record.rejected[1])
    arrays, _ = read_adapter(config.run_dir / "adapters" / "round-1")
    assert all(np.isfinite(array).all() for array in arrays.values())


def call_itself(number: object) -> Tamper:
    """A node's answer to the question which client it is."""

    def tamper(question: Message, reply: Message) -> Message:
        record = RecordDict() if number is None else RecordDict({"client": MetricRecord({"client-id": number})})  # type: ignore[dict-item]
        return Message(record, reply_to=question)

    return tamper


@pytest.mark.parametrize("lie", [None, float("nan"), [1, 2], 0], ids=["nothing", "nan", "list", "another client"])
def test_node_that_lies_about_who_it_is_is_left_out(tmp_path: Path, model: Path, lie: object) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config, tamper={1: call_itself(lie)}, tampered=QUERY)
    (record,) = rounds_of(config)
    assert (record.accepted, record.rejected) == ([0, 2], {})


def test_run_without_enough_nodes_that_say_who_they_are_ends(tmp_path: Path, model: Path) -> None:
    with pytest.raises(TooFewClients, match="1 of at least 2 clients said who they are"):
        train(small_run(tmp_path, model), tamper={0: call_itself(None), 2: node_gone}, tampered=QUERY)


def test_rejected_client_is_left_out_of_the_average(tmp_path: Path, model: Path) -> None:
    with_bad = small_run(tmp_path, model, run_dir=tmp_path / "bad", rounds=1)
    train(with_bad, tamper={2: poison})
    without = small_run(tmp_path, model, run_dir=tmp_path / "without", rounds=1)
    train_federation(LocalGrid(without, [0, 1]), without)
    assert rounds_of(with_bad)[0].adapter_sha256 == rounds_of(without)[0].adapter_sha256


def test_round_without_enough_clients_ends_the_run_with_their_reasons(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model)
    with pytest.raises(TooFewClients, match=r"1 of at least 2 updates are usable \(client 0: .*; client 2: no answer"):
        train(config, tamper={0: crash, 2: silent})
    assert not (config.run_dir / "rounds.jsonl").exists()


def test_sampling_is_fixed_by_the_seed_and_changes_over_rounds(tmp_path: Path, model: Path) -> None:
    settings = {"clients_per_round": 2, "rounds": 4, "samples_per_client": 2}
    first = train(small_run(tmp_path, model, run_dir=tmp_path / "1", **settings))
    second = train(small_run(tmp_path, model, run_dir=tmp_path / "2", **settings))
    assert first.rounds == second.rounds
    assert len({tuple(clients) for clients in first.rounds}) > 1
    assert all(len(clients) == 2 for clients in first.rounds)


def test_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, model: Path) -> None:
    whole = small_run(tmp_path, model, run_dir=tmp_path / "whole", rounds=3)
    train(whole)
    train(small_run(tmp_path, model, run_dir=tmp_path / "parts", rounds=1))
    resumed = small_run(tmp_path, model, run_dir=tmp_path / "parts", rounds=3)
    grid = train(resumed)
    assert len(grid.rounds) == 2
    assert [r.adapter_sha256 for r in rounds_of(resumed)] == [r.adapter_sha256 for r in rounds_of(whole)]


def test_crash_between_adapter_and_record_does_the_round_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path, model)

    def power_cut(path: Path, line: str) -> None:
        path.write_text(line[:40])
        raise OSError(5, "power cut", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_line", power_cut)
        with pytest.raises(OSError, match="power cut"):
            train(config)
    train(config)
    assert [record.round_number for record in rounds_of(config)] == [1, 2]


def test_crash_while_the_adapter_is_written_does_the_round_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path, model, rounds=2)
    whole = small_run(tmp_path, model, rounds=2, run_dir=tmp_path / "whole")
    train(whole)
    written = []

    def dies(directory: Path, *arguments: Any) -> AdapterManifest:
        written.append(directory.name)
        if directory.name == "round-2":
            raise KeyboardInterrupt
        return write_adapter(directory, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_adapter", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert written == ["round-0", "round-1", "round-2"]
    train(config)
    assert [r.adapter_sha256 for r in rounds_of(config)] == [r.adapter_sha256 for r in rounds_of(whole)]


@pytest.mark.parametrize("torn", [b'{"round_number": 2, "adap', '{"name": "é'.encode()[:-1]])
def test_torn_last_line_is_dropped(tmp_path: Path, model: Path, torn: bytes) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config)
    rounds = config.run_dir / "rounds.jsonl"
    before = rounds.read_bytes()
    rounds.write_bytes(before + torn)
    assert RunFolder(config).finished == 1
    assert rounds.read_bytes() == before


def test_record_that_holds_a_line_separator_is_read_back(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config)
    folder = RunFolder(config)
    folder.finish_round(folder.rounds[0].model_copy(update={"round_number": 2, "filter_model_id": "a\u2028b\x85c"}))
    assert RunFolder(config).rounds[1].filter_model_id == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rounds.jsonl", "{}\n", r"rounds\.jsonl: not written by this version"),
        ("rounds.jsonl", None, r"rounds\.jsonl: does not hold rounds 1 to 2"),
        ("config.json", "{", r"holds rounds, but no readable config\.json"),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, model: Path, name: str, content: str | None, message: str) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config)
    file = config.run_dir / name
    file.write_text(content if content is not None else file.read_text() * 2)  # twice the same round
    with pytest.raises(ConfigError, match=message):
        RunFolder(config)


def test_resume_on_another_base_model_is_refused(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    train(small_run(tmp_path, copy, rounds=1))
    build_tiny_model(copy, seed=5)
    _load.cache_clear()
    with pytest.raises(AdapterError, match="was trained on a base model with sha256"):
        train(small_run(tmp_path, copy, rounds=2))


def test_client_with_another_base_model_does_not_train(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_tiny_model(tmp_path / "other", seed=9)
    config = small_run(tmp_path, model, rounds=1)
    grid = LocalGrid(config, range(3))
    grid.set_node_config(2, {"base-model": str(other)})
    train_federation(grid, config)
    (record,) = rounds_of(config)
    assert list(record.rejected) == [2]
    assert "client 2: base-model other has sha256" in record.rejected[2]


def test_client_with_another_version_installed_does_not_train_and_says_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(("fedward 0.1.0, flwr 1.41", "fedward 0.2.0, flwr 1.41", "fedward 0.1.0, flwr 1.41"))
    monkeypatch.setattr(client_app, "installed_versions", lambda: next(versions))
    config = small_run(tmp_path, model, rounds=1)
    monkeypatch.setattr(server_app, "installed_versions", lambda: "fedward 0.1.0, flwr 1.41")
    train(config)
    (record,) = rounds_of(config)
    assert record.accepted == [0, 2]
    told = "fedward 0.2.0, flwr 1.41 is installed here, fedward 0.1.0, flwr 1.41 at the coordinator; install that"
    assert record.rejected == {1: f"client 1: {told}"}


def test_finished_run_is_not_trained_again(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config)
    assert train(config).rounds == []


def test_folder_of_another_configuration_is_refused(tmp_path: Path, model: Path) -> None:
    train(small_run(tmp_path, model, rounds=1))
    with pytest.raises(ConfigError, match=r"holds rounds of another configuration \(seed: 0 -> 7\)"):
        train(small_run(tmp_path, model, seed=7))
    with pytest.raises(ConfigError, match="holds 1 finished rounds; set resume=true"):
        train(small_run(tmp_path, model, resume=False))


def test_resume_refuses_an_adapter_that_was_changed(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model, rounds=1)
    train(config)
    weights = config.run_dir / "adapters" / "round-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AdapterError, match="has sha256"):
        train(small_run(tmp_path, model, rounds=2))


def test_unwritable_folder_is_a_configuration_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file/run"):
        RunFolder(small_run(tmp_path, model, run_dir=tmp_path / "file" / "run"))


def test_filter_arm_trains_on_curated_shards_and_reports_them(
    tmp_path: Path, model: Path, services: FakeServices
) -> None:
    config = small_run(tmp_path, model, arm="filter", safety_url=services.url, harmful_share=0.5)
    train(config)
    first, second = rounds_of(config)
    assert first.curation is not None
    assert (first.curation.total, first.curation.kept, first.curation.dropped) == (12, 6, 6)
    assert (first.curation_precision, first.curation_recall) == (1.0, 1.0)
    assert set(first.client_curation) == {0, 1, 2}
    assert second.curation == first.curation
    assert services.calls("/v1/classify") == 3  # once per client, not once per round
    assert first.client_tokens[0] < 100
    manifest = read_manifest(config.run_dir / "adapters" / "round-2")
    assert (manifest.filter_model_id, manifest.filter_model_sha256) == ("fake-filter", "f" * 64)
    assert manifest.data_counts["dropped"] == 6


def test_client_never_trains_unfiltered_when_its_safety_service_is_down(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    config = small_run(tmp_path, model, arm="filter", safety_url=closed_port())
    with pytest.raises(TooFewClients, match=r"client 0: safety: .*; client 1: safety: .*; client 2: safety: "):
        train(config)


def test_client_whose_safety_service_fails_is_left_out_and_the_round_goes_on(
    tmp_path: Path, model: Path, services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    config = small_run(tmp_path, model, arm="filter", safety_url=services.url, rounds=1, harmful_share=0.5)
    grid = LocalGrid(config, range(3))
    with trainer_services() as broken:
        broken.fail_paths["/v1/classify"] = 500
        grid.set_node_config(1, {"safety-url": broken.url})
        train_federation(grid, config)
    (record,) = rounds_of(config)
    assert record.accepted == [0, 2]
    assert list(record.rejected) == [1]
    assert record.rejected[1].startswith("client 1: safety: HTTP 500")


def test_unforeseen_error_of_a_client_is_told_without_its_text(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: RunConfig, client_id: int) -> list[Pair]:
        raise KeyError(f"a prompt with {BAD}")

    monkeypatch.setattr(client_app, "client_shard", fails)
    with pytest.raises(TooFewClients) as caught:
        train(small_run(tmp_path, model))
    assert "client 0: KeyError in test_trainer_rounds.py, line " in caught.value.message
    assert BAD not in caught.value.message


def test_malicious_client_with_nothing_left_fails_and_the_round_goes_on(
    tmp_path: Path, model: Path, services: FakeServices
) -> None:
    config = small_run(
        tmp_path, model, arm="filter", safety_url=services.url, harmful_share=0.3, placement="concentrated", rounds=1
    )
    train(config)
    (record,) = rounds_of(config)
    assert record.rejected == {0: "client 0: shard 0: no pair is left to train on (4 before curation)"}


def test_own_data_of_a_client_with_a_bad_line_fails_that_client_only(tmp_path: Path, model: Path) -> None:
    for client in range(3):
        pairs = [{"prompt": f"p{client}", "response": "r"}] * 3
        write_jsonl(tmp_path / f"silo-{client}.jsonl", pairs)
    (tmp_path / "silo-1.jsonl").write_text('{"prompt": "x"}\n')
    own = {"shard_data": f"{tmp_path}/silo-{{shard}}.jsonl", "benign_data": "", "harmful_data": ""}
    config = small_run(tmp_path, model, rounds=1, **own)
    train(config)
    (record,) = rounds_of(config)
    assert record.accepted == [0, 2]
    assert "silo-1.jsonl:1: response: Field required" in record.rejected[1]


def test_both_stages_together(tmp_path: Path, model: Path, services: FakeServices) -> None:
    config = small_run(
        tmp_path, model, arm="filter+cai", safety_url=services.url, inference_url=services.url,
        coordinator_critique_url=services.url, cai_steps=2, cai_prompts=4, cai_benign_prompts=1, rounds=1,
    )  # fmt: skip
    train(config)
    (record,) = rounds_of(config)
    assert record.cai is not None
    assert record.cai.steps == 2
    assert record.curation is not None
    assert set(record.seconds_by_phase) == {"train", "aggregate", "cai"}
    manifest = read_manifest(config.run_dir / "adapters" / "round-1")
    assert manifest.constitution_sha256 == record.cai.constitution_sha256


def context_of(config: RunConfig) -> Context:
    """What Flower gives the ServerApp."""
    values = {name: "" if value is None else value for name, value in config.model_dump(mode="json").items()}
    return Context(1, 1, {}, RecordDict(), run_values(**values))


def test_failed_run_leaves_its_error_and_exit_code(tmp_path: Path, model: Path) -> None:
    config = small_run(tmp_path, model, arm="cai", inference_url=closed_port(), coordinator_critique_url=closed_port())
    grid = LocalGrid(config, range(3))
    context = context_of(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
        with pytest.raises(UpstreamUnavailable):
            main(grid, context)
    result = json.loads((config.run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", UpstreamUnavailable.exit_code)
    assert result["error"].startswith("inference: ")
