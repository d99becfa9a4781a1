"""Checks on what clients send, and the weighted average, against arrays worked out by hand."""

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import AdapterError
from tests.regenerate_golden import FEDAVG, average_golden_updates
from trainer.aggregation import (
    MAX_WEIGHT,
    Arrays,
    ClientUpdate,
    RunningMean,
    TooFewClients,
    check_update,
    count_bytes,
    mean_by_tokens,
    require_enough,
)

METRICS = ("num-tokens", "loss")


def floats(values: object) -> npt.NDArray[np.float32]:
    return np.asarray(values, np.float32)


def reference() -> Arrays:
    return {"a": np.zeros((2, 2), np.float32), "b": np.zeros((), np.float32)}


def update(client_id: int = 3, tokens: float = 10, loss: float = 1.0, **arrays: object) -> ClientUpdate:
    changed = {name: np.asarray(value) for name, value in arrays.items()}
    return ClientUpdate(client_id, reference() | changed, {"num-tokens": tokens, "loss": loss})


def mean_of(*updates: tuple[Arrays, int]) -> Arrays:
    running = RunningMean()
    for arrays, weight in updates:
        running.add(arrays, weight)
    return running.mean()


def test_average_is_weighted_by_tokens() -> None:
    one = {"a": floats([[4, 0], [0, 8]]), "b": floats(4)}
    three = {"a": floats([[0, 4], [0, 8]]), "b": floats(0)}
    averaged = mean_of((one, 1), (three, 3))
    np.testing.assert_array_equal(averaged["a"], floats([[1, 3], [0, 8]]))
    assert averaged["b"].shape == ()
    assert averaged["b"] == 1.0
    assert {array.dtype for array in averaged.values()} == {np.dtype(np.float32)}


def test_average_of_one_client_is_that_client() -> None:
    only = {"a": floats([[1, 2], [0.1, 1e-30]])}
    np.testing.assert_array_equal(mean_of((only, 7))["a"], only["a"])


@given(
    st.lists(
        st.tuples(st.floats(-1e4, 1e4, width=32), st.integers(1, 2**20)), min_size=2, max_size=12
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_average_does_not_depend_on_the_order_of_arrival(
    values: list[tuple[float, int]], shuffler: random.Random
) -> None:
    updates = [({"a": floats([value])}, weight) for value, weight in values]
    average = mean_of(*updates)["a"][0]
    shuffler.shuffle(updates)
    assert mean_of(*updates)["a"][0] == average
    exact = sum(Fraction(value) * weight for value, weight in values) / sum(weight for _, weight in values)
    assert average == pytest.approx(float(exact), rel=2**-23, abs=1e-40)


def test_average_keeps_what_a_plain_float32_or_float64_sum_loses() -> None:
    big, small = {"a": floats([2.0**60])}, {"a": floats([1.0])}
    average = mean_of((big, 1), (small, 1), ({"a": floats([-(2.0**60)])}, 1), (small, 1))
    assert average["a"][0] == 0.5


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1])
def test_weight_that_would_not_be_exact_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match=f"a weight of {weight} is not from 1 to"):
        mean_of((reference(), weight))


def test_update_that_changes_too_much_is_refused_with_the_figure() -> None:
    far = update(a=floats([[3, 0], [0, 4]]))
    check_update(far, reference(), METRICS, max_tokens=1000, max_norm=5.0)
    with pytest.raises(AdapterError, match=r"client 3: the update's norm is 5, and max-update-norm is 4\.9"):
        check_update(far, reference(), METRICS, max_tokens=1000, max_norm=4.9)


def test_average_reproduces_the_golden_file() -> None:
    golden = json.loads(FEDAVG.read_text())
    averaged = average_golden_updates()
    assert set(averaged) == set(golden["averaged"])
    for name, values in golden["averaged"].items():
        np.testing.assert_allclose(averaged[name], values, rtol=golden["tolerance"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update(a=floats([[1, np.nan], [0, 0]])), "client 3: parameter a holds NaN or infinity"),
        (update(a=floats([[1, np.inf], [0, 0]])), "client 3: parameter a holds NaN or infinity"),
        (update(b=np.float32(np.nan)), "client 3: parameter b holds NaN"),
        (update(a=np.zeros((2, 3), np.float32)), r"client 3: parameter a has shape \(2, 3\), not \(2, 2\)"),
        (update(b=np.zeros((1,), np.float32)), r"client 3: parameter b has shape \(1,\), not \(\)"),
        (update(a=np.zeros((2, 2), np.float64)), "client 3: parameter a has dtype float64, not float32"),
        (update(c=np.float32(1)), "client 3: parameter c is unknown"),
        (ClientUpdate(3, {"a": reference()["a"]}, {"num-tokens": 1, "loss": 1}), "client 3: parameter b is missing"),
        (update(tokens=0), "client 3: num-tokens is 0"),
        (update(tokens=-5), "client 3: num-tokens is -5"),
        (update(tokens=2.5), "client 3: num-tokens is 2.5"),
        (update(tokens=1001), "client 3: num-tokens is 1001, which is not a whole number from 1 to 1000"),
        (update(tokens=float("nan")), "client 3: num-tokens is nan"),
        (update(loss=float("inf")), "client 3: loss is inf"),
        (ClientUpdate(3, reference(), {"num-tokens": 1}), "client 3: unexpected or missing counts: loss"),
        (
            ClientUpdate(3, reference(), {"num-tokens": 1, "loss": 1, "prompt-hash": 5}),
            "client 3: unexpected or missing counts: prompt-hash",
        ),
    ],
)
def test_bad_update_is_refused_by_client_and_reason(bad: ClientUpdate, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_update(bad, reference(), METRICS, max_tokens=1000)


def test_good_update_passes() -> None:
    check_update(update(a=floats([[1, 2], [3, 4]])), reference(), METRICS, max_tokens=1000)


def test_too_few_updates_end_the_round_with_every_reason() -> None:
    require_enough([update(0), update(1)], {2: "client 2: gone"}, min_clients=2)
    with pytest.raises(TooFewClients, match=r"1 of at least 2 updates are usable \(client 0: NaN; client 2: gone\)"):
        require_enough([update(1)], {2: "client 2: gone", 0: "client 0: NaN"}, min_clients=2)


def test_metrics_are_averaged_as_adapters_are() -> None:
    assert mean_by_tokens([update(0, 1, loss=5.0), update(1, 3, loss=1.0)], "loss") == 2.0


def test_bytes_are_those_of_the_numbers() -> None:
    assert count_bytes(reference()) == 4 * 4 + 4


def test_golden_files_say_how_they_are_made() -> None:
    for path in (FEDAVG, Path(FEDAVG).with_name("sft.json")):
        assert json.loads(path.read_text())["made_by"] == "python -m tests.regenerate_golden"
