"""Directions of LoRA changes against dense matrices, and the linear probe's file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import AdapterError, ConfigError
from trainer.aggregation import Arrays
from trainer.directions import (
    Change,
    DirectionProbe,
    Matrix,
    agreement,
    cosine,
    fit_probe,
    inner,
    layer_change,
    read_probe,
    write_probe,
)

MODULES = ("base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.mlp.up_proj")
OTHER_LAYER = "base_model.model.model.layers.10.self_attn.q_proj"


def adapter(seed: int, rank: int = 2) -> Arrays:
    generator = np.random.default_rng(seed)
    arrays = {}
    for module in (*MODULES, OTHER_LAYER):
        arrays[f"{module}.lora_A.weight"] = generator.normal(size=(rank, 5)).astype(np.float32)
        arrays[f"{module}.lora_B.weight"] = generator.normal(size=(4, rank)).astype(np.float32)
    return arrays


def dense(arrays: Arrays, sent: Arrays) -> Matrix:
    """What changed in layer 0, as one long vector."""

    def product(source: Arrays, module: str) -> Matrix:
        b, a = source[f"{module}.lora_B.weight"], source[f"{module}.lora_A.weight"]
        return b.astype(np.float64) @ a.astype(np.float64)

    return np.concatenate([(product(arrays, m) - product(sent, m)).ravel() for m in sorted(MODULES)])


def changes(count: int) -> list[Change]:
    return [layer_change(adapter(seed), adapter(99), 0) for seed in range(count)]


def test_inner_product_is_that_of_the_dense_matrices() -> None:
    sent = adapter(99)
    one, two = layer_change(adapter(0), sent, 0), layer_change(adapter(1), sent, 0)
    first, second = dense(adapter(0), sent), dense(adapter(1), sent)
    assert inner(one, two) == pytest.approx(first @ second)
    assert cosine(one, two) == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_change_worked_out_by_hand() -> None:
    name = MODULES[0]
    sent = {f"{name}.lora_A.weight": np.array([[1.0, 2.0]]), f"{name}.lora_B.weight": np.array([[0.0], [0.0]])}
    up = sent | {f"{name}.lora_B.weight": np.array([[1.0], [0.0]])}  # changes the layer by [[1, 2], [0, 0]]
    aside = sent | {f"{name}.lora_B.weight": np.array([[0.0], [3.0]])}  # by [[0, 0], [3, 6]]
    one, two = layer_change(up, sent, 0), layer_change(aside, sent, 0)
    assert inner(one, one) == pytest.approx(1 + 4)
    assert inner(two, two) == pytest.approx(9 + 36)
    assert cosine(one, two) == 0
    assert cosine(one, layer_change(sent, sent, 0)) == 0


def test_adapters_of_different_ranks_compare() -> None:
    sent = adapter(99, rank=3)
    assert cosine(layer_change(adapter(0, rank=1), sent, 0), layer_change(adapter(0, rank=1), sent, 0)) == 1


def test_layer_without_modules_is_refused() -> None:
    with pytest.raises(AdapterError, match="no LoRA module in layer 1"):
        layer_change(adapter(0), adapter(1), 1)


@given(order=st.permutations(range(5)))
def test_agreement_does_not_depend_on_the_order_of_clients(order: list[int]) -> None:
    given_changes = changes(5)
    shuffled = agreement([given_changes[client] for client in order])
    assert shuffled == pytest.approx([agreement(given_changes)[client] for client in order])


@given(factor=st.floats(1e-3, 1e3))
def test_directions_do_not_depend_on_the_length_of_a_change(factor: float) -> None:
    given_changes = changes(4)
    scaled = [{name: part._replace(left=factor * part.left) for name, part in c.items()} for c in given_changes]
    probe = fit_probe(given_changes[:2], given_changes[2:], 0, {})
    assert agreement(scaled) == pytest.approx(agreement(given_changes))
    assert [probe.score(c) for c in scaled] == pytest.approx([probe.score(c) for c in given_changes])


def test_agreement_of_one_against_three_alike() -> None:
    alike, odd = changes(2)
    *of_alike, of_odd = agreement([alike, alike, alike, odd])
    assert of_alike == pytest.approx([1, 1, 1])
    assert of_odd == pytest.approx(cosine(alike, odd))
    assert agreement([odd]) == [1.0]


def test_probe_is_the_difference_of_the_mean_directions() -> None:
    sent = adapter(99)
    units = [dense(adapter(seed), sent) / np.linalg.norm(dense(adapter(seed), sent)) for seed in range(4)]
    wanted = (units[0] + units[1]) / 2 - (units[2] + units[3]) / 2
    given_changes = changes(4)
    probe = fit_probe(given_changes[:2], given_changes[2:], 0, {})
    assert probe.score(given_changes[0]) == pytest.approx(wanted @ units[0] / np.linalg.norm(wanted))
    assert probe.score(layer_change(sent, sent, 0)) == 0


def test_probe_of_other_modules_is_refused() -> None:
    probe = DirectionProbe({MODULES[0]: np.ones((4, 5))}, 0, {})
    with pytest.raises(AdapterError, match="trained on an adapter of other modules"):
        probe.score(changes(1)[0])


def test_probe_comes_back_from_its_file(tmp_path: Path) -> None:
    probe = fit_probe(changes(2)[:1], changes(2)[1:], 0, {"seeds": [1, 2]})
    write_probe(tmp_path / "probe.safetensors", probe)
    back = read_probe(tmp_path / "probe.safetensors")
    assert (back.layer, back.provenance) == (0, {"seeds": [1, 2]})
    assert back.score(changes(1)[0]) == pytest.approx(probe.score(changes(1)[0]), abs=1e-3)


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_file_that_is_no_probe_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "probe.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"probe\.safetensors: not a probe"):
        read_probe(path)
