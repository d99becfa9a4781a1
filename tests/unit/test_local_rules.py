"""What strategies change about local training: on functions whose solutions are known, and on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from services.contracts.errors import AdapterError, DataError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import make_config
from tests.regenerate_golden import PAIRS
from trainer.aggregation import Arrays, ClientUpdate
from trainer.batching import encode_pairs
from trainer.control import read_control, split_control, with_control, write_control
from trainer.local_rules import Gradients, LocalRule
from trainer.lora import A_SUFFIX, B_SUFFIX
from trainer.model import Trainee, load_trainee, read_adapter_arrays, set_adapter_arrays
from trainer.sft import MAX_GRADIENT_NORM, train_sft
from trainer.strategies.base import Strategy
from trainer.strategies.fedavg import FedAvg
from trainer.strategies.scaffold import Scaffold

RATE, STEPS = 0.1, 10
CURVES = ((1.0, 0.0), (4.0, 1.0))  # client i's loss is a / 2 * (x - b)^2
OPTIMUM = (1 * 0 + 4 * 1) / (1 + 4)


def floats(value: float) -> Arrays:
    return {"w" + A_SUFFIX: np.full((1, 1), value, np.float32)}


def descend(curve: tuple[float, float], start: Arrays, rule: LocalRule, steps: int = STEPS) -> tuple[Arrays, Arrays]:
    """Plain SGD; gives the end point and the mean gradient."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in start.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    gradients = Gradients(parameters, rule)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = sum(curve[0] / 2 * (parameter - curve[1]).square().sum() for parameter in parameters.values())
        loss.backward()  # type: ignore[union-attr]
        gradients.before_clipping()
        gradients.after_clipping()
        optimizer.step()
    return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}, gradients.mean()


def federate(strategy: Strategy, train: Callable[[int, Arrays], Arrays], rounds: int = 60) -> float:
    adapter = floats(0.0)
    for round_number in range(1, rounds + 1):
        sent = strategy.begin(adapter, round_number)
        for client in range(len(CURVES)):
            strategy.add(ClientUpdate(client, train(client, sent), {"num-tokens": 1}))
        adapter = strategy.finish()
    return float(next(iter(adapter.values()))[0, 0])


def test_fedavg_drifts_away_from_the_optimum_where_its_fixed_point_is() -> None:
    shrink = [(1 - RATE * a) ** STEPS for a, _ in CURVES]  # y_i = b + shrink * (x - b)
    fixed = (1 - shrink[1]) / (2 - sum(shrink))
    found = federate(FedAvg(), lambda client, sent: descend(CURVES[client], sent, LocalRule())[0])
    assert found == pytest.approx(fixed, abs=1e-5)
    assert abs(found - OPTIMUM) > 0.15


def test_scaffold_reaches_the_optimum_of_all() -> None:
    own = [floats(0.0), floats(0.0)]

    def train(client: int, sent: Arrays) -> Arrays:
        adapter, control = split_control(sent)
        correction = {name: control[name] - own[client][name] for name in control}
        end, mean = descend(CURVES[client], adapter, LocalRule(correction=correction))
        for name in adapter:  # the paper's option II: c_i - c + (x - y) / (K lr)
            option_two = own[client][name] - control[name] + (adapter[name] - end[name]) / (STEPS * RATE)
            np.testing.assert_allclose(mean[name], option_two, atol=1e-5)
        change = {name: mean[name] - own[client][name] for name in mean}
        own[client] = mean
        return with_control(end, change)

    scaffold = Scaffold(learning_rate=1.0, num_clients=2, max_gradient_norm=10.0)
    assert federate(scaffold, train) == pytest.approx(OPTIMUM, abs=1e-4)


def test_proximal_term_is_squared_and_pulls_to_the_start() -> None:
    mu, start, (a, b) = 2.0, 5.0, (1.0, 0.0)
    end, _ = descend((a, b), floats(start), LocalRule(proximal_mu=mu), steps=200)
    assert end["w" + A_SUFFIX][0, 0] == pytest.approx((a * b + mu * start) / (a + mu), rel=1e-5)


@pytest.fixture(scope="module")
def trainee(tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    model = build_tiny_model(tmp_path_factory.mktemp("rules") / "tiny")
    return load_trainee(
        make_config(arm="none", benign_data="b", harmful_data="h", base_model=model, lora_rank=3, max_length=96)
    )


def trained(trainee: Trainee, rule: LocalRule) -> tuple[Arrays, Arrays]:
    set_adapter_arrays(trainee, trainee.starting_adapter)
    dataset = encode_pairs(PAIRS, trainee.tokenizer, 96)
    result = train_sft(trainee, dataset, steps=3, batch_size=2, learning_rate=1e-2, seed=0, rule=rule)
    return read_adapter_arrays(trainee), result.mean_gradient


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_b_is_trained_and_the_next_training_has_both_again(trainee: Trainee, optimizer: str) -> None:
    arrays, _ = trained(trainee, LocalRule(b_only=True, optimizer=optimizer))  # type: ignore[arg-type]
    for name, start in trainee.starting_adapter.items():
        assert (arrays[name] == start).all() == name.endswith(A_SUFFIX)
    both, _ = trained(trainee, LocalRule())
    assert not any((both[name] == start).all() for name, start in trainee.starting_adapter.items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_components_from_the_trained_rank_on_stay_as_they_are(trainee: Trainee, optimizer: str) -> None:
    arrays, _ = trained(trainee, LocalRule(trained_rank=2, optimizer=optimizer))  # type: ignore[arg-type]
    for name, start in trainee.starting_adapter.items():
        changed = (arrays[name] != start).any(axis=1 if name.endswith(A_SUFFIX) else 0)
        assert not changed[2]
        if name.endswith(B_SUFFIX):
            assert changed[:2].all()


def test_plain_rule_trains_as_before_and_a_zero_correction_changes_nothing(trainee: Trainee) -> None:
    plain, nothing = trained(trainee, LocalRule())
    zeros = {name: np.zeros_like(array) for name, array in trainee.starting_adapter.items()}
    corrected, mean = trained(trainee, LocalRule(correction=zeros))
    assert nothing == {}
    assert all((plain[name] == corrected[name]).all() for name in plain)
    assert set(mean) == set(zeros)
    assert 0 < np.sqrt(sum(np.square(array).sum() for array in mean.values())) <= MAX_GRADIENT_NORM * 1.001


def test_correction_moves_plain_sgd_by_exactly_itself(trainee: Trainee) -> None:
    """One step: the gradient is the same with and without."""
    dataset = encode_pairs(PAIRS, trainee.tokenizer, 96)
    ends = []
    for size in (0.0, 0.5):
        set_adapter_arrays(trainee, trainee.starting_adapter)
        rule = LocalRule(
            optimizer="sgd", correction={n: np.full_like(a, size) for n, a in trainee.starting_adapter.items()}
        )
        train_sft(trainee, dataset, steps=1, batch_size=2, learning_rate=0.1, seed=0, rule=rule)
        ends.append(read_adapter_arrays(trainee))
    for name in ends[0]:
        np.testing.assert_allclose(ends[0][name] - ends[1][name], 0.05, atol=1e-6)


def test_control_variate_of_the_last_counted_round_is_kept_beside_the_newest(tmp_path: Path) -> None:
    like = floats(0.0)
    assert read_control(tmp_path, 0, like) == like
    write_control(tmp_path, 1, floats(1.0), last_counted=0)
    write_control(tmp_path, 3, floats(3.0), last_counted=1)  # round 3 may not count
    write_control(tmp_path, 4, floats(4.0), last_counted=1)
    assert read_control(tmp_path, 1, like) == floats(1.0)
    assert read_control(tmp_path, 4, like) == floats(4.0)
    with pytest.raises(DataError, match=r"round-3\.safetensors of this client's SCAFFOLD state cannot be read"):
        read_control(tmp_path, 3, like)


def test_damaged_or_foreign_control_variate_is_refused(tmp_path: Path) -> None:
    write_control(tmp_path, 1, floats(1.0), last_counted=0)
    with pytest.raises(AdapterError, match="this client's SCAFFOLD state: parameter w is missing"):
        read_control(tmp_path, 1, {"w": np.zeros(1, np.float32)})
    (tmp_path / "control" / "round-1.safetensors").write_bytes(b"no such thing")
    with pytest.raises(DataError, match="cannot be read \\(SafetensorError\\)"):
        read_control(tmp_path, 1, floats(0.0))
