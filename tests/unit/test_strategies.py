"""What each strategy makes of updates, against arrays worked out by hand, and whatever order they arrive in."""

import random
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.errors import AdapterError, ConfigError
from tests.fakes.trainer_runs import be_the_coordinator, make_config
from trainer.aggregation import Arrays, ClientUpdate, check_arrays
from trainer.config import B_ONLY, RESIDUAL, ROBUST_NEEDS, SEVERAL_RANKS, StrategyName
from trainer.control import split_control, with_control
from trainer.lora import A_SUFFIX, B_SUFFIX, Factors, b_only, cut, head, pad, to_layers, truncate
from trainer.strategies import Strategy, make_strategy
from trainer.strategies.fedex import FedEx
from trainer.strategies.flexlora import FlexLora
from trainer.strategies.flora import Flora

NAMES = get_args(StrategyName)
RANK, RESIDUAL_RANK, CLIENTS = 4, 2, 8
Matrix = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def coordinator() -> None:
    be_the_coordinator()


def strategy(name: str, **changes: object) -> Strategy:
    needs: dict[str, object] = {
        "strategy": name, "arm": "none", "benign_data": "b", "harmful_data": "h", "lora_rank": RANK, "min_clients": 7,
        "num_clients": CLIENTS, "residual_rank": RESIDUAL_RANK if name in RESIDUAL else 0,
        "malicious_clients": 1 if name in ROBUST_NEEDS else 0, "proximal_mu": 0.1 if name == "fedprox" else 0.0,
    }  # fmt: skip
    return make_strategy(make_config(**(needs | changes)))  # type: ignore[arg-type]


def floats(values: object) -> npt.NDArray[np.float32]:
    return np.asarray(values, np.float32)


def lora(a: object, b: object) -> Arrays:
    return {"m" + A_SUFFIX: floats(a), "m" + B_SUFFIX: floats(b)}


def made_up(seed: int, rank: int = RANK, scale: float = 1.0) -> Arrays:
    """An adapter of two layers with random values."""
    generator = np.random.default_rng(seed)
    shapes = {"m.0": (6, 5), "m.1": (4, 7)}
    arrays = {}
    for layer, (wide, high) in shapes.items():
        arrays[layer + A_SUFFIX] = floats(generator.normal(size=(rank, wide)) * scale)
        arrays[layer + B_SUFFIX] = floats(generator.normal(size=(high, rank)) * scale)
    return arrays


def update(client: int, arrays: Arrays, tokens: int = 1) -> ClientUpdate:
    return ClientUpdate(client, arrays, {"num-tokens": tokens})


def aggregate(chosen: Strategy, sent: Arrays, updates: list[ClientUpdate], round_number: int = 1) -> Arrays:
    chosen.begin(sent, round_number)
    for one in updates:
        check_arrays(f"client {one.client_id}", one.arrays, chosen.reply_reference(one.arrays))
        chosen.add(one)
    return chosen.finish()


def product(arrays: Arrays, layer: str = "m") -> Matrix:
    pair = to_layers(arrays)[layer]
    return np.asarray(pair.b.astype(np.float64) @ pair.a)


# What clients of each strategy send back of a trained adapter.
def reply(name: str, arrays: Arrays) -> Arrays:
    if name in B_ONLY:
        return b_only(arrays)
    if name in RESIDUAL:
        return head(arrays, RANK - RESIDUAL_RANK)
    if name == "scaffold":
        return with_control(arrays, {key: array * floats(0.01) for key, array in arrays.items()})
    return arrays


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(shuffler=st.randoms(use_true_random=False))
def test_result_does_not_depend_on_the_order_of_arrival(name: str, shuffler: random.Random) -> None:
    sent = made_up(99)
    updates = [update(client, reply(name, made_up(client)), tokens=1 + 7**client) for client in range(CLIENTS)]
    first = aggregate(strategy(name), sent, updates)
    shuffler.shuffle(updates)
    second = aggregate(strategy(name), sent, updates)
    check_arrays(name, first, sent)
    assert all(first[key].tobytes() == second[key].tobytes() for key in sent)


@pytest.mark.parametrize("name", NAMES)
def test_strategy_goes_on_from_its_saved_state_as_if_it_had_not_stopped(name: str) -> None:
    def go(chosen: Strategy, adapter: Arrays, rounds: range) -> Arrays:
        for number in rounds:
            replies = [update(c, reply(name, made_up(10 * number + c)), tokens=c + 1) for c in range(CLIENTS)]
            adapter = aggregate(chosen, adapter, replies, number)
        return adapter

    whole = go(strategy(name), made_up(99), range(1, 4))
    before, after = strategy(name), strategy(name)
    adapter = go(before, made_up(99), range(1, 3))
    after.restore({key: array.copy() for key, array in before.state().items()})
    resumed = go(after, adapter, range(3, 4))
    assert all(whole[key].tobytes() == resumed[key].tobytes() for key in whole)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"])
def test_strategy_with_a_state_has_one_after_a_round(name: str) -> None:
    chosen = strategy(name)
    assert chosen.state() == {}
    aggregate(chosen, made_up(99), [update(0, reply(name, made_up(0)))])
    assert chosen.state()


def test_state_of_another_strategy_is_refused() -> None:
    with pytest.raises(AdapterError, match="FedAvg keeps no state, but there is one of 4 arrays"):
        strategy("fedavg").restore(made_up(0))


def one_number(value: float) -> Arrays:
    return lora([[value]], [[value]])


def number(arrays: Arrays) -> float:
    assert arrays["m" + A_SUFFIX] == arrays["m" + B_SUFFIX]
    return float(arrays["m" + A_SUFFIX][0, 0])


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_mean_is_weighted_by_tokens(name: str) -> None:
    averaged = aggregate(strategy(name), one_number(9), [update(0, one_number(4), 1), update(1, one_number(0), 3)])
    assert number(averaged) == 1.0


def test_fedavgm_has_momentum_and_starts_from_what_was_sent() -> None:
    chosen = strategy("fedavgm", server_momentum=0.5)
    first = aggregate(chosen, one_number(10), [update(0, one_number(6)), update(1, one_number(10))])
    assert number(first) == 8.0  # g = 10 - 8 = 2, m = 2, new = 10 - 2
    aligned = one_number(7)  # what the constitutional stage made of the 8
    assert number(aggregate(chosen, aligned, [update(0, one_number(6))], 2)) == 5.0  # m = 0.5 * 2 + 1, new = 7 - 2


def test_fedavgm_takes_its_learning_rate() -> None:
    chosen = strategy("fedavgm", server_momentum=0.0, server_learning_rate=0.25)
    assert number(aggregate(chosen, one_number(10), [update(0, one_number(6))])) == 9.0


ADAPTIVE = {"server_learning_rate": 0.1, "server_momentum": 0.5, "server_beta2": 0.75, "server_tau": 0.5}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # d = 2, m = 0.5 * 2 = 1, v = 0.25 * 4 = 1; Flower's bias correction is that of the round after this one
        ("fedadam", 3 + 0.1 * np.sqrt(1 - 0.75**2) / (1 - 0.5**2) * 1 / (1 + 0.5)),
        ("fedyogi", 3 + 0.1 * 1 / (1 + 0.5)),  # v = 0 - 0.25 * 4 * sign(0 - 4) = 1
        ("fedadagrad", 3 + 0.1 * 2 / (2 + 0.5)),  # m = d = 2, v = 4
    ],
)
def test_adaptive_step(name: str, expected: float) -> None:
    chosen = strategy(name, **ADAPTIVE)
    assert number(aggregate(chosen, one_number(3), [update(0, one_number(5))])) == pytest.approx(expected, rel=1e-6)


def test_scaffold_steps_and_updates_its_control_variate() -> None:
    chosen = strategy("scaffold", server_learning_rate=0.5)
    sent = one_number(1)
    assert split_control(chosen.begin(sent, 1))[1] == one_number(0)
    replies = [
        update(0, with_control(one_number(2), one_number(0.5)), tokens=1),
        update(1, with_control(one_number(6), one_number(0.1)), tokens=99),  # counts no more than the other
    ]
    assert number(aggregate(chosen, sent, replies)) == 2.5  # 1 + 0.5 * (4 - 1)
    assert number(chosen.state()) == pytest.approx(0.3 * 2 / CLIENTS)


def test_control_variate_that_no_clipped_gradient_gives_is_refused() -> None:
    chosen = strategy("scaffold")
    chosen.begin(one_number(1), 1)
    with pytest.raises(AdapterError, match=r"client 5: its control variate changed by 2\.828, and clipped gradients"):
        chosen.add(update(5, with_control(one_number(2), one_number(2))))


DIAGONAL = [lora([[1, 0]], [[1], [0]]), lora([[0, 1]], [[0], [1]])]  # products diag(1, 0) and diag(0, 1)


def test_averaging_factors_apart_is_off_by_the_known_term() -> None:
    averaged = aggregate(strategy("fedavg"), DIAGONAL[0], [update(0, DIAGONAL[0]), update(1, DIAGONAL[1])])
    one, two = (to_layers(adapter)["m"] for adapter in DIAGONAL)
    off = (one.b - two.b) @ (one.a - two.a) / 4
    np.testing.assert_allclose(product(averaged), np.diag([0.5, 0.5]) - off)


def test_flexlora_is_exact_as_far_as_the_rank_goes() -> None:
    sent = lora(np.zeros((2, 2)), np.zeros((2, 2)))
    updates = [
        update(c, pad(adapter, 1, to=2), tokens)
        for c, (adapter, tokens) in enumerate(zip(DIAGONAL, (3, 1), strict=True))
    ]
    chosen = FlexLora()
    aggregated = aggregate(chosen, sent, updates)
    np.testing.assert_allclose(product(aggregated), np.diag([1.5, 0.5]), atol=1e-6)  # pad doubles, as alpha / r halves
    assert chosen.metrics == {"truncation-error": 0.0}


def test_flexlora_reports_what_the_rank_cannot_hold() -> None:
    chosen = FlexLora()
    aggregated = aggregate(chosen, DIAGONAL[0], [update(0, DIAGONAL[0], 3), update(1, DIAGONAL[1], 1)])
    np.testing.assert_allclose(product(aggregated), np.diag([0.75, 0]), atol=1e-7)
    assert chosen.metrics["truncation-error"] == pytest.approx(0.25 / np.hypot(0.75, 0.25))


@pytest.mark.parametrize("name", SEVERAL_RANKS)
def test_clients_of_several_ranks(name: str) -> None:
    """The sum of w_i (alpha / r_i) B_i A_i, with alpha = 16."""
    chosen = strategy(name, **({"server_momentum": 0.0} if name == "fedavgm" else {}))
    sent = made_up(99)
    replies = {client: made_up(client, rank) for client, rank in enumerate((1, 2, 3))}
    aggregated = aggregate(chosen, sent, [update(c, arrays, tokens=c + 1) for c, arrays in replies.items()])
    check_arrays(name, aggregated, sent)
    if name == "flexlora":
        for layer in ("m.0", "m.1"):
            exact = np.sum([(c + 1) / 6 * 16 / (c + 1) * product(one, layer) for c, one in replies.items()], axis=0)
            closest = truncate(Factors(np.eye(exact.shape[1]), exact), RANK).factors
            np.testing.assert_allclose(16 / RANK * product(aggregated, layer), closest.b @ closest.a, atol=1e-4)
    elif name == "fedavg":
        padded = [pad(arrays, client + 1, to=RANK) for client, arrays in replies.items()]
        for key in sent:
            mean = sum((c + 1) / 6 * arrays[key] for c, arrays in enumerate(padded))
            np.testing.assert_allclose(aggregated[key], mean, rtol=1e-5, atol=1e-6)


def test_flexlora_sends_small_clients_the_largest_components() -> None:
    chosen = FlexLora()
    sent = chosen.begin(made_up(1), 1)
    np.testing.assert_allclose(product(sent, "m.0"), product(made_up(1), "m.0"), atol=1e-5)
    u, s, vt = np.linalg.svd(product(made_up(1), "m.0"))
    for rank in (1, 2, 3):
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(RANK / rank * product(cut(sent, rank, of=RANK), "m.0"), best, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_outside_of_the_adapters_is_refused(rank: int) -> None:
    chosen = strategy("fedavg")
    chosen.begin(made_up(0), 1)
    too_much = made_up(1, rank)
    with pytest.raises(AdapterError, match=rf"has shape \({rank}, 6\), not \(4, 6\)"):
        check_arrays("client 1", too_much, chosen.reply_reference(too_much))


def test_layers_of_different_ranks_are_refused() -> None:
    chosen = strategy("flexlora")
    chosen.begin(made_up(0), 1)
    mixed = made_up(1, 2) | {name: array for name, array in made_up(1, 3).items() if name.startswith("m.1")}
    with pytest.raises(AdapterError, match=r"parameter m\.1\.lora_A\.weight has shape \(3, 4\), not \(2, 4\)"):
        check_arrays("client 1", mixed, chosen.reply_reference(mixed))


@pytest.mark.parametrize("kind", [FedEx, Flora])
def test_residual_makes_the_sum_of_products_exact(kind: type[FedEx]) -> None:
    """Two rounds: what the first left in the tail is carried on."""
    residual = 5  # rank of two rounds of two clients with one component each, and more
    chosen = Flora(residual_rank=residual, seed=0) if kind is Flora else FedEx(residual_rank=residual)
    adapter = pad(made_up(5, rank=1), 1, to=1 + residual)
    for round_number in (1, 2):
        one, three = (made_up(10 * round_number + client, rank=1) for client in range(2))
        exact = {}
        for layer, pair in to_layers(adapter).items():
            exact[layer] = pair.b[:, 1:].astype(np.float64) @ pair.a[1:]
            exact[layer] += 0.25 * product(one, layer) + 0.75 * product(three, layer)
        adapter = aggregate(chosen, adapter, [update(0, one, 1), update(1, three, 3)], round_number)
        assert chosen.metrics["truncation-error"] < 1e-6
        for layer, wanted in exact.items():
            np.testing.assert_allclose(product(adapter, layer), wanted, atol=1e-5)
    if kind is Flora:
        assert not any(head(b_only(adapter), 1)[name].any() for name in b_only(adapter))


def test_residual_that_does_not_fit_is_cut_and_reported() -> None:
    """diag(1, 0), diag(0, 1): the mean of factors gives 0.25 everywhere, and the residual has one more component."""
    chosen = FedEx(residual_rank=1)
    sent = lora(np.zeros((2, 3)), np.zeros((3, 2)))
    three = [lora(np.eye(3)[[i]], np.eye(3)[:, [i]]) for i in range(3)]
    aggregated = aggregate(chosen, sent, [update(i, adapter) for i, adapter in enumerate(three)])
    missing = np.linalg.norm(product(aggregated) - np.eye(3) / 3)
    assert missing == pytest.approx(1 / 3)  # the residual (I - ones / 3) / 3 has two components of that size
    assert chosen.metrics["truncation-error"] == pytest.approx(missing / np.linalg.norm(np.eye(3) / 3))


def test_flora_starts_each_round_from_another_a_that_the_seed_decides() -> None:
    heads = []
    for seed, round_number in ((0, 1), (0, 1), (0, 2), (1, 1)):
        chosen = Flora(residual_rank=2, seed=seed)
        adapter = aggregate(chosen, made_up(9), [update(0, head(made_up(1), 2))], round_number)
        heads.append(adapter["m.0" + A_SUFFIX][:2])
    assert (heads[0] == heads[1]).all()
    assert not (heads[0] == heads[2]).any()
    assert not (heads[0] == heads[3]).any()
    assert np.abs(heads[0]).max() <= 1 / np.sqrt(6)


@pytest.mark.parametrize("name", B_ONLY)
def test_products_are_averaged_exactly_when_only_b_is_trained(name: str) -> None:
    sent = made_up(9)
    replies = [b_only(made_up(client)) for client in range(2)]
    aggregated = aggregate(strategy(name), sent, [update(0, replies[0], 1), update(1, replies[1], 3)])
    for layer in ("m.0", "m.1"):
        wanted = 0.25 * product(sent | replies[0], layer) + 0.75 * product(sent | replies[1], layer)
        np.testing.assert_allclose(product(aggregated, layer), wanted, atol=1e-5)
    a = aggregated["m.0" + A_SUFFIX]
    if name == "ffa-lora":
        assert (a == sent["m.0" + A_SUFFIX]).all()
    else:
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)


def test_fedsvd_can_start_from_an_untrained_adapter() -> None:
    sent = made_up(9)
    untrained = {name: np.zeros_like(array) for name, array in b_only(sent).items()}
    aggregated = aggregate(strategy("fedsvd"), sent, [update(0, untrained)])
    a = aggregated["m.0" + A_SUFFIX]
    np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)
    assert not aggregated["m.0" + B_SUFFIX].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("median", 4.0),
        ("trimmed-mean", 4.0),  # of 2, 3, 4, 5, 6
        ("krum", 4.0),  # nearest to its four nearest
        ("multikrum", 3.5),  # all but the 1000
        ("bulyan", 3.0),  # Multi-Krum leaves 1 to 5; of these the three nearest to their median
    ],
)
def test_robust_rule_is_not_moved_by_one_hostile_update(name: str, expected: float) -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1000.0]
    updates = [update(client, one_number(value)) for client, value in enumerate(values)]
    assert number(aggregate(strategy(name), one_number(0), updates)) == pytest.approx(expected)


def test_too_few_updates_for_bulyan_are_an_error() -> None:
    with pytest.raises(ConfigError, match="Bulyan gave no aggregate of 6 updates"):
        aggregate(strategy("bulyan"), one_number(0), [update(client, one_number(client)) for client in range(6)])


def test_adapter_of_other_parameters_is_no_pair_of_factors() -> None:
    with pytest.raises(ConfigError, match="A and B matrices only"):
        strategy("flexlora").begin(made_up(0) | {"bias": floats([1])}, 1)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_truncation_is_the_closest_of_its_rank(rank: int) -> None:
    pair = to_layers(made_up(3))["m.0"]
    result = truncate(pair, rank)
    s = np.linalg.svd(pair.b.astype(np.float64) @ pair.a, compute_uv=False)
    assert result.lost == pytest.approx(np.square(s[rank:]).sum(), abs=1e-10)
    missing = pair.b.astype(np.float64) @ pair.a - result.factors.b @ result.factors.a
    assert np.square(missing).sum() == pytest.approx(result.lost, abs=1e-10)


def test_cut_and_pad_keep_what_an_adapter_means() -> None:
    """Under alpha / r: padding changes nothing, and cutting leaves the first components."""
    small = made_up(3, rank=2)
    np.testing.assert_allclose(product(pad(small, 2, to=4), "m.0") / 4, product(small, "m.0") / 2, atol=1e-6)
    assert all((cut(pad(small, 2, to=4), 2, of=4)[name] == array).all() for name, array in small.items())
