"""Strategies in the round loop, with real clients on a tiny model: resume, state, ranks, and memory."""

import tracemalloc
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.numpy import load_file

from services.contracts.adapters import read_manifest
from services.contracts.errors import AdapterError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import LocalGrid, small_run, train
from tests.unit.test_trainer_rounds import poison, rounds_of
from trainer import run_folder
from trainer.aggregation import Arrays
from trainer.config import RunConfig, RunValue
from trainer.exchange import PULLED_AT_ONCE, Fleet
from trainer.lora import A_SUFFIX, B_SUFFIX, to_layers
from trainer.registry import read_adapter
from trainer.server_app import collect_updates, train_federation
from trainer.strategies import make_strategy
from trainer.strategies.flower import to_record

SETTINGS: dict[str, dict[str, RunValue]] = {
    "fedprox": {"proximal_mu": 1.0},
    "fedavgm": {},
    "fedadam": {"server_learning_rate": 0.01},
    "scaffold": {},
    "ffa-lora": {},
    "fedsvd": {},
    "flexlora": {},
    "fedex-lora": {"residual_rank": 2},
    "flora": {"residual_rank": 2},
    "trimmed-mean": {"malicious_clients": 1, "min_clients": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run_of(folder: Path, model: Path, strategy: str, **changes: RunValue | Path) -> RunConfig:
    settings: dict[str, RunValue | Path] = {"strategy": strategy, "lora_rank": 4, **SETTINGS.get(strategy, {})}
    return small_run(folder, model, **(settings | changes))


def adapter_of(config: RunConfig, round_number: int) -> Arrays:
    arrays, _ = read_adapter(config.run_dir / "adapters" / f"round-{round_number}")
    return arrays


@pytest.mark.parametrize("strategy", SETTINGS)
def test_resumed_run_ends_as_an_uninterrupted_one_and_learns(tmp_path: Path, model: Path, strategy: str) -> None:
    whole = run_of(tmp_path, model, strategy, run_dir=tmp_path / "whole")
    train(whole)
    train(run_of(tmp_path, model, strategy, run_dir=tmp_path / "parts", rounds=1))
    parts = run_of(tmp_path, model, strategy, run_dir=tmp_path / "parts")
    train(parts)
    assert [r.adapter_sha256 for r in rounds_of(parts)] == [r.adapter_sha256 for r in rounds_of(whole)]
    assert [r.strategy_state_sha256 for r in rounds_of(parts)] == [r.strategy_state_sha256 for r in rounds_of(whole)]
    first, second = rounds_of(whole)
    assert (first.accepted, first.rejected, first.strategy) == ([0, 1, 2], {}, strategy)
    assert first.loss is not None
    assert second.loss is not None
    assert second.loss < first.loss
    assert read_manifest(whole.run_dir / "adapters" / "round-2").config["strategy"] == strategy


def test_round_that_is_done_again_gives_the_same_adapter_under_scaffold(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients have a control variate from the first attempt, which must not count."""
    whole = run_of(tmp_path, model, "scaffold", run_dir=tmp_path / "whole")
    train(whole)
    config = run_of(tmp_path, model, "scaffold")

    def power_cut(path: Path, line: str) -> None:
        raise OSError(5, "power cut", str(path))

    for rounds_done in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "append_line", power_cut)
            with pytest.raises(OSError, match="power cut"):
                train(config)
        train(run_of(tmp_path, model, "scaffold", rounds=rounds_done + 1))
    assert [r.adapter_sha256 for r in rounds_of(config)] == [r.adapter_sha256 for r in rounds_of(whole)]


def test_scaffold_keeps_c_the_mean_of_the_clients_variates_when_an_update_is_refused(
    tmp_path: Path, model: Path
) -> None:
    config = run_of(tmp_path, model, "scaffold", rounds=3)
    refused: list[int] = []

    def refuse_in_round_2(question: Message, answer: Message) -> Message:
        refused.append(int(question.content.config_records["config"]["round"]))  # type: ignore[arg-type]
        return poison(question, answer) if refused[-1] == 2 else answer

    train(config, tamper={1: refuse_in_round_2})
    assert [record.accepted for record in rounds_of(config)] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    own = [load_file(config.run_dir / "clients" / str(c) / "control" / "round-3.safetensors") for c in range(3)]
    c = load_file(config.run_dir / "strategy" / "round-3.safetensors")
    for name, array in c.items():
        np.testing.assert_allclose(array, sum(client[name] for client in own) / 3, atol=1e-6)


def test_client_that_lost_its_control_variate_is_left_out_with_the_reason(tmp_path: Path, model: Path) -> None:
    train(run_of(tmp_path, model, "scaffold", rounds=1))
    (tmp_path / "run" / "clients" / "2" / "control" / "round-1.safetensors").unlink()
    config = run_of(tmp_path, model, "scaffold")
    train(config)
    assert rounds_of(config)[1].rejected == {
        2: "client 2: round-1.safetensors of this client's SCAFFOLD state cannot be read (FileNotFoundError); restore "
        "the client's folder, or start a new run"
    }


@pytest.mark.parametrize(("damage", "message"), [(b"other", "is not as it was written"), (None, "cannot be read")])
def test_state_of_the_strategy_that_was_changed_is_refused(
    tmp_path: Path, model: Path, damage: bytes | None, message: str
) -> None:
    config = run_of(tmp_path, model, "fedavgm")
    train(config)
    state = config.run_dir / "strategy"
    assert [file.name for file in state.iterdir()] == ["round-2.safetensors"]  # those before are not needed any more
    file = state / "round-2.safetensors"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(AdapterError, match=f"round-2.safetensors: {message}"):
        train(run_of(tmp_path, model, "fedavgm", rounds=3))


@pytest.mark.parametrize("strategy", ["fedavg", "flexlora"])
def test_silos_train_adapters_of_their_own_rank(tmp_path: Path, model: Path, strategy: str) -> None:
    config = run_of(tmp_path, model, strategy, rounds=1)
    grid = LocalGrid(config, range(3))
    grid.set_node_config(1, {"client-rank": 2})
    grid.set_node_config(2, {"client-rank": 1})
    train_federation(grid, config)
    (record,) = rounds_of(config)
    assert record.accepted == [0, 1, 2]
    assert record.bytes_up == record.bytes_down / 3 * (1 + 1 / 2 + 1 / 4)
    assert {pair.a.shape[0] for pair in to_layers(adapter_of(config, 1)).values()} == {4}
    if strategy == "flexlora":
        assert 0 < record.strategy_metrics["truncation-error"] < 0.9


def test_silo_with_a_rank_that_the_strategy_does_not_take_is_told_so(tmp_path: Path, model: Path) -> None:
    config = run_of(tmp_path, model, "ffa-lora", rounds=1)
    grid = LocalGrid(config, range(3))
    grid.set_node_config(1, {"client-rank": 2})
    train_federation(grid, config)
    assert "client 1: run-config: strategy=ffa-lora needs one rank everywhere" in rounds_of(config)[0].rejected[1]


@pytest.mark.parametrize("strategy", ["ffa-lora", "fedsvd"])
def test_only_b_comes_back(tmp_path: Path, model: Path, strategy: str) -> None:
    config = run_of(tmp_path, model, strategy)
    train(config)
    start, end = adapter_of(config, 0), adapter_of(config, 2)
    size = sum(array.nbytes for name, array in start.items() if name.endswith(B_SUFFIX))
    assert rounds_of(config)[1].bytes_up == 3 * size
    unchanged = [(start[name] == end[name]).all() for name in start if name.endswith(A_SUFFIX)]
    assert all(unchanged) if strategy == "ffa-lora" else not any(unchanged)


def test_update_over_the_norm_bound_costs_its_client_the_round(tmp_path: Path, model: Path) -> None:
    def exaggerate(question: Message, answer: Message) -> Message:
        arrays = {name: array.numpy() * 100 for name, array in answer.content.array_records["arrays"].items()}
        answer.content["arrays"] = to_record(arrays)
        return answer

    config = run_of(tmp_path, model, "fedavg", rounds=1, max_update_norm=10.0)
    train(config, tamper={0: exaggerate})
    (record,) = rounds_of(config)
    assert record.accepted == [1, 2]
    assert "client 0: the update's norm is " in record.rejected[0]


class ReadyGrid(LocalGrid):
    """All nodes have answered when the coordinator first looks; a reply is made when it is pulled."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.questions = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self.questions[message.metadata.message_id] = message
        return list(self.questions)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        assert len(ids) <= PULLED_AT_ONCE
        return [self._answer(self.questions.pop(message_id)) for message_id in ids]

    def _answer(self, question: Message) -> Message:
        generator = np.random.default_rng(question.metadata.dst_node_id)
        arrays = question.content.array_records["arrays"]
        made = {n: generator.normal(size=tuple(a.shape)).astype(np.float32) for n, a in arrays.items()}
        counts = MetricRecord({"num-tokens": 5, "loss": 1.0, "steps": 1, "skipped": 0, "train-seconds": 0.1})
        return Message(RecordDict({"arrays": to_record(made), "metrics": counts}), reply_to=question)


def test_memory_of_a_round_does_not_grow_with_the_number_of_clients(tmp_path: Path, model: Path) -> None:
    config = run_of(tmp_path, model, "fedavg")
    sent = {"m" + A_SUFFIX: np.zeros((16, 4000), np.float32), "m" + B_SUFFIX: np.zeros((4000, 16), np.float32)}
    size = sum(array.nbytes for array in sent.values())
    peaks = []
    for count in (60, 180):
        grid = ReadyGrid(config, [])
        strategy = make_strategy(config)
        strategy.begin(sent, 1)
        orders = dict.fromkeys(range(count), ConfigRecord())
        tracemalloc.start()
        accepted, rejected, bytes_up = collect_updates(
            Fleet(grid, config), strategy, sent, orders, {n: n for n in orders}, config
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert ([update.client_id for update in accepted], rejected) == (list(range(count)), {})
        assert bytes_up == count * size
        assert all(update.arrays == {} for update in accepted)
    assert peaks[1] - peaks[0] < 0.1 * 120 * size  # of 120 more clients; what is there is envelopes
