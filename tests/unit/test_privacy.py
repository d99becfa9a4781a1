"""Client-level privacy: clipping and noise worked out by hand, epsilon against exact values, ledgers, resume."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, Message
from scipy import stats

from services.contracts.adapters import read_manifest
from services.contracts.errors import ConfigError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import LocalGrid, make_config, small_run, train
from tests.unit.test_strategies import floats, lora, update
from tests.unit.test_trainer_rounds import rounds_of
from trainer import privacy_budget, run_folder
from trainer.aggregation import Arrays, TooFewClients, distance
from trainer.config import RunConfig, RunValue
from trainer.privacy import Mechanism, NoisedMean, secure_normal
from trainer.privacy_budget import epsilon_of
from trainer.run_folder import read_result
from trainer.server_app import train_federation
from trainer.strategies import Strategy, make_strategy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def no_noise(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return np.zeros(shape)


def seeded(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return np.random.default_rng(7).normal(size=shape)


SENT: Arrays = {"a": floats([1.0, 1.0]), "b": floats([[0.0]])}


def test_long_update_is_shortened_to_the_norm_over_all_parameters_together() -> None:
    trained = {"a": floats([1.0, 4.0]), "b": floats([[4.0]])}  # a change of (0, 3) and 4: of norm 5
    clipped = Mechanism(1.0, 1.0, no_noise).clip(trained, SENT)
    np.testing.assert_allclose(clipped["a"], [1.0, 1.6], rtol=1e-15)
    np.testing.assert_allclose(clipped["b"], [[0.8]], rtol=1e-15)


def test_short_update_and_one_without_change_stay_as_they_are() -> None:
    mechanism = Mechanism(5.0, 1.0, no_noise)
    trained = {"a": floats([1.0, 4.0]), "b": floats([[4.0]])}
    assert mechanism.clip(trained, SENT) == trained
    assert mechanism.clip(SENT, SENT) == SENT


def test_huge_update_is_clipped_without_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    trained = {"a": floats([-largest, largest]), "b": floats([[largest]])}
    clipped = Mechanism(2.0, 1.0, no_noise).clip(trained, SENT)
    assert distance(clipped, SENT) == pytest.approx(2.0, rel=1e-9)


def test_every_client_counts_the_same_and_none_more_than_its_clipped_change() -> None:
    mean = NoisedMean(Mechanism(1.0, 1.0, no_noise), SENT)
    mean.add({"a": floats([1.0, 4.0]), "b": floats([[4.0]])}, 1000)
    mean.add({"a": floats([1.5, 1.0]), "b": floats([[0.0]])}, 1)
    np.testing.assert_allclose(mean.mean()["a"], [1.25, 1.3], rtol=1e-6)
    np.testing.assert_allclose(mean.mean()["b"], [[0.4]], rtol=1e-6)


def test_noise_has_the_deviation_of_multiplier_times_norm_by_clients() -> None:
    sent = {"a": np.zeros(100_000, np.float32)}
    mean = NoisedMean(Mechanism(2.0, 3.0, seeded), sent)
    for _ in range(4):
        mean.add(sent, 1)
    noise = mean.mean()["a"]
    assert stats.kstest(noise, stats.norm(0, 3.0 * 2.0 / 4).cdf).pvalue > 0.01
    assert stats.kstest(noise, stats.norm(0, 1.05 * 3.0 * 2.0 / 4).cdf).pvalue < 0.01


def test_secure_noise_is_normal_and_never_the_same() -> None:
    drawn = secure_normal((200, 500))
    assert drawn.shape == (200, 500)
    assert np.isfinite(drawn).all()
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-9  # unseeded: a right generator fails once in 10^9 runs
    assert not np.isin(drawn, secure_normal((200, 500))).any()


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_secure_noise_is_finite_at_both_ends_of_the_generator(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr("os.urandom", lambda size: np.full(size // 8, bits, np.uint64).tobytes())
    assert abs(secure_normal((3,))) == pytest.approx(8.2095, abs=1e-3)


# Computed with Google's dp-accounting 0.6.0, which cannot be installed beside this project:
#     a = pld_privacy_accountant.PLDAccountant()
#     a.compose(SelfComposedDpEvent(GaussianDpEvent(noise_multiplier / 2), releases)); a.get_epsilon(1e-5)
# and RdpAccountant likewise, whose bound is what Opacus 1.6.0 gives, too.
REFERENCE = [
    (1.0, 1, 9.997256, 10.725510), (1.0, 10, 46.211210, 48.801693), (1.0, 100, 284.391850, 294.861260),
    (2.0, 1, 4.377178, 4.728507), (2.0, 10, 17.856587, 19.053598), (2.0, 100, 91.817290, 96.116308),
    (8.0, 1, 0.926342, 1.012551), (8.0, 10, 3.341409, 3.617100), (8.0, 100, 13.206712, 14.132226),
]  # fmt: skip


@pytest.mark.parametrize(("noise_multiplier", "releases", "tight", "renyi"), REFERENCE)
def test_epsilon_is_that_of_another_accountant(
    noise_multiplier: float, releases: int, tight: float, renyi: float
) -> None:
    epsilon = epsilon_of(releases, noise_multiplier, 1e-5)
    assert epsilon == pytest.approx(tight, rel=1e-6)
    assert epsilon < renyi


def test_epsilon_of_a_published_case() -> None:
    """Epsilon 1 at delta 1e-5 needs 3.7306 times the sensitivity: the calibration of Balle and Wang's own code."""
    assert epsilon_of(1, 2 * 3.730631634944469, 1e-5) == pytest.approx(1.0, rel=1e-9)


def test_four_times_the_releases_cost_as_much_as_half_the_noise() -> None:
    assert epsilon_of(4, 2.0, 1e-6) == epsilon_of(1, 1.0, 1e-6)


def test_epsilon_is_zero_where_delta_alone_covers_a_release() -> None:
    distinguishable = 2 * stats.norm.cdf(0.5 * 0.002) - 1  # total variation of two normals 0.002 deviations apart
    assert epsilon_of(1, 1000.0, distinguishable * 1.001) == 0.0
    assert epsilon_of(1, 1000.0, distinguishable * 0.999) > 0.0


@pytest.mark.parametrize("releases", [1, privacy_budget.MAX_RELEASES])
@pytest.mark.parametrize("noise_multiplier", [1e-6, 1000.0])
def test_epsilon_is_finite_at_the_extremes(releases: int, noise_multiplier: float) -> None:
    assert 0 <= epsilon_of(releases, noise_multiplier, 1e-5) < math.inf


DEALT: dict[str, RunValue] = {"arm": "none", "benign_data": "b", "harmful_data": "h"}


def private_strategy(name: str, **changes: RunValue) -> Strategy:
    values: dict[str, RunValue] = DEALT | {"strategy": name}
    if name == "fedprox":
        values["proximal_mu"] = 0.1
    return make_strategy(make_config(**(values | {"dp": "central", "lora_rank": 2} | changes)))


def test_lower_rank_is_refused_because_its_missing_rows_would_not_be_clipped() -> None:
    strategy = private_strategy("fedavg")
    sent = lora([[1, 2], [3, 4]], [[1, 0], [0, 1]])
    strategy.begin(sent, 1)
    assert strategy.reply_reference(lora([[1, 2]], [[1], [0]])) is sent


def test_noise_on_both_factors_is_warned_of_and_on_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    private_strategy("ffa-lora")
    assert not caplog.records
    private_strategy("fedavg")
    assert "their product multiplies the two noises; with ffa-lora there is noise on B alone" in caplog.text


def test_ffa_lora_puts_noise_on_b_only() -> None:
    strategy = private_strategy("ffa-lora")
    sent = lora([[1, 2], [3, 4]], [[0, 0], [0, 0]])
    b = next(name for name in sent if "lora_B" in name)
    strategy.begin(sent, 1)
    strategy.add(update(0, {b: sent[b]}))
    made = strategy.finish()
    assert [name for name in made if not np.array_equal(made[name], sent[name])] == [b]


# In rounds, with real clients on a tiny model.


def private_run(folder: Path, model: Path, dp: str = "central", **changes: RunValue | Path) -> RunConfig:
    settings: dict[str, RunValue | Path] = {"dp": dp, "strategy": "ffa-lora", "dp_clipping_norm": 0.01}
    return small_run(folder, model, **(settings | changes))


def spent(config: RunConfig) -> list[tuple[int, float]]:
    found = [record.privacy for record in rounds_of(config)]
    return [(one.releases, one.epsilon) for one in found if one is not None]


@pytest.mark.parametrize("dp", ["central", "local"])
def test_rounds_and_result_tell_what_was_spent(tmp_path: Path, model: Path, dp: str) -> None:
    config = private_run(tmp_path, model, dp)
    train(config)
    assert spent(config) == [(1, epsilon_of(1, 1.0, 1e-5)), (2, epsilon_of(2, 1.0, 1e-5))]
    result = read_result(config.run_dir)
    assert result is not None
    assert result.privacy == rounds_of(config)[-1].privacy
    manifest = read_manifest(config.run_dir / "adapters" / "round-2")
    assert manifest.data_counts == {"clients": 3}  # exact counts of tokens would go round the noise
    assert (manifest.config["dp"], manifest.config["dp-noise-multiplier"]) == (dp, 1.0)


def test_round_that_is_done_again_is_paid_for_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private_run(tmp_path, model)

    def power_cut(path: Path, line: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(run_folder, "append_line", power_cut)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (config.run_dir / "rounds.jsonl").exists()
    train(config)
    assert [releases for releases, _ in spent(config)] == [2, 3]
    ledger = privacy_budget.read_ledger(config.run_dir / privacy_budget.LEDGER)
    assert [release.round_number for release in ledger] == [1, 1, 2]


def test_resumed_run_does_not_forget_what_was_spent(tmp_path: Path, model: Path) -> None:
    train(private_run(tmp_path, model, rounds=1))
    whole = private_run(tmp_path, model)
    train(whole)
    assert [releases for releases, _ in spent(whole)] == [1, 2]


def test_run_whose_ledger_is_lost_does_not_go_on(tmp_path: Path, model: Path) -> None:
    train(private_run(tmp_path, model, rounds=1))
    whole = private_run(tmp_path, model)
    (whole.run_dir / privacy_budget.LEDGER).unlink()
    for _ in range(3):  # trying again does not fill it up
        with pytest.raises(ConfigError, match=r"holds 0 releases, and the rounds that are finished made 1: without"):
            train(whole)


def test_run_whose_ledger_is_damaged_does_not_go_on(tmp_path: Path, model: Path) -> None:
    train(private_run(tmp_path, model, rounds=1))
    whole = private_run(tmp_path, model)
    (whole.run_dir / privacy_budget.LEDGER).write_text('{"round_number": 1, "noise_multiplier": 0}\n')
    with pytest.raises(ConfigError, match=r"releases\.jsonl cannot be read, and without it epsilon is unknown"):
        train(whole)


def test_releases_of_other_runs_count_by_their_noise(tmp_path: Path) -> None:
    """Gaussian mechanisms add up by 1 / z^2: one release at z = 1 costs what four at z = 2 do."""
    loud, quiet = (make_config(**DEALT, dp="local", dp_noise_multiplier=noise) for noise in (2.0, 1.0))
    assert privacy_budget.note_release(tmp_path, quiet, 1) == 1
    assert privacy_budget.note_release(tmp_path, loud, 1) == 4 + 1
    assert privacy_budget.note_release(tmp_path, quiet, 2) == 3  # 1 + 1 / 4 + 1, rounded up


def test_no_round_is_released_that_would_spend_more_than_the_limit(tmp_path: Path, model: Path) -> None:
    limit = epsilon_of(2, 1.0, 1e-5) + 0.01
    config = private_run(tmp_path, model, rounds=3, dp_max_epsilon=limit)
    with pytest.raises(TooFewClients, match=r"round 3 would take epsilon to .* and dp-max-epsilon is"):
        train(config)
    assert [releases for releases, _ in spent(config)] == [1, 2]
    train(private_run(tmp_path, model, rounds=3, dp_max_epsilon=0.0))  # the limit may be lifted
    assert [releases for releases, _ in spent(config)] == [1, 2, 3]


def test_coordinator_keeps_the_limit_where_a_round_was_done_again(tmp_path: Path, model: Path) -> None:
    config = private_run(tmp_path, model, rounds=1, dp_max_epsilon=epsilon_of(1, 1.0, 1e-5) + 0.01)
    privacy_budget.note_release(config.run_dir, config, 1)
    with pytest.raises(ConfigError, match="round 1 would take epsilon to"):
        train(config)
    assert not (config.run_dir / "adapters" / "round-1").exists()


@pytest.mark.parametrize(
    ("dp", "own", "reason"),
    [
        ("off", {"dp-max-epsilon": 5.0}, "dp-max-epsilon=5 needs dp=central or dp=local"),
        ("central", {"dp-max-epsilon": 5.0}, "would take epsilon to 9.997 at delta 1e-05"),
        ("local", {"dp-max-epsilon": 5.0}, "would take epsilon to 9.997 at delta 1e-05"),
        ("local", {"dp-max-epsilon": 10.0, "dp-delta": 1e-9}, "would take epsilon to 13.53 at delta 1e-09"),
    ],
)
def test_silo_with_a_limit_of_its_own_sends_nothing_that_passes_it(
    tmp_path: Path, model: Path, dp: str, own: dict[str, str | int], reason: str
) -> None:
    config = private_run(tmp_path, model, dp, rounds=1, min_clients=2)
    grid = LocalGrid(config, range(3))
    grid.set_node_config(1, own)
    train_federation(grid, config)
    (record,) = rounds_of(config)
    assert record.accepted == [0, 2]
    assert reason in record.rejected[1]


def test_client_under_local_privacy_counts_its_releases_itself(tmp_path: Path, model: Path) -> None:
    """A client that was asked before, by an attempt that left no trace at the coordinator, has spent more."""
    config = private_run(tmp_path, model, "local", rounds=1)
    for _ in range(4):
        privacy_budget.note_release(config.run_dir / "clients" / "1", config, 1)
    train(config)
    assert [releases for releases, _ in spent(config)] == [5]


def test_update_under_local_privacy_is_noise_before_it_leaves_the_client(tmp_path: Path, model: Path) -> None:
    changes: list[float] = []
    sizes: list[int] = []

    def listen(question: Message, reply: Message) -> Message:
        sent, back = (arrays_of(message) for message in (question, reply))
        changes.append(distance(back, sent))
        sizes.append(sum(array.size for array in back.values()))
        assert list(reply.content.metric_records["metrics"]) == [privacy_budget.RELEASES]
        return reply

    config = private_run(tmp_path, model, "local", rounds=1, dp_noise_multiplier=100.0)
    train(config, tamper=dict.fromkeys(range(3), listen))
    # The norm of k normal numbers of deviation 1 is sqrt(k) to within 1 (standard error 0.7), and the update adds 0.01.
    assert changes == pytest.approx([math.sqrt(sizes[0])] * 3, abs=5)
    (record,) = rounds_of(config)
    assert (record.loss, record.client_losses, record.client_tokens, record.client_seconds) == (None, {}, {}, {})


def arrays_of(message: Message) -> Arrays:
    record: ArrayRecord = message.content.array_records["arrays"]
    return {name: array.numpy() for name, array in record.items()}


def test_noise_of_two_runs_differs_although_the_seed_is_the_same(tmp_path: Path, model: Path) -> None:
    runs = [private_run(tmp_path, model, rounds=1, run_dir=tmp_path / name) for name in ("a", "b")]
    for run in runs:
        train(run)
    first, second = (rounds_of(run)[0] for run in runs)
    assert first.client_losses == second.client_losses
    assert first.adapter_sha256 != second.adapter_sha256


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "scaffold"}, "dp=central with strategy=scaffold: clipping bounds what a client can change in a"),
        ({"strategy": "flexlora"}, r"choose one of fedavg, .* \(best ffa-lora\)"),
        ({"strategy": "median", "malicious_clients": 1, "min_clients": 3}, "dp=central with strategy=median"),
        ({"dp": "local", "strategy": "flora", "residual_rank": 2}, "dp=local with strategy=flora"),
        ({"strategy": "fedavg", "client_rank": 2}, "one rank everywhere"),
        (
            {"strategy": "fedavg", "screening": "drop", "red_team_data": "r"},
            "dp=central with screening=drop: which updates",
        ),
        ({"strategy": "fedavg", "screening": "down-weight", "red_team_data": "r"}, "choose one of the two"),
        ({"max_update_norm": 1.0}, "dp=central clips long updates at dp-clipping-norm"),
        ({"dp_delta": 0.2}, r"dp-delta=0.2 .* well below 1 / num-clients \(0.125\)"),
        ({"dp_noise_multiplier": 0.0}, "dp-noise-multiplier: Input should be greater than 0"),
        ({"dp_clipping_norm": 0.0}, "dp-clipping-norm: Input should be greater than 0"),
        ({"dp": "both"}, "dp: Input should be 'off', 'central' or 'local'"),
        ({"secure_aggregation": True}, "and dp=central read it there: they exclude each other"),
        ({"secure_aggregation": True, "dp": "local"}, "Flower has SecAgg\\+ for its legacy apps only"),
        (
            {
                "secure_aggregation": True,
                "dp": "off",
                "strategy": "fedavg",
                "screening": "report",
                "red_team_data": "r",
            },
            "and screening=report read it there: they exclude each other",
        ),
        (
            {"secure_aggregation": True, "dp": "off", "strategy": "median", "malicious_clients": 1, "min_clients": 3},
            "and strategy=median read it there",
        ),
        ({"secure_aggregation": True, "dp": "off", "max_update_norm": 1.0}, "and max-update-norm read it there"),
    ],
)
def test_settings_that_contradict_privacy_are_refused_with_the_reason(
    changes: dict[str, RunValue], reason: str
) -> None:
    settings: dict[str, RunValue] = DEALT | {"dp": "central"}
    with pytest.raises(ConfigError, match=reason):
        make_config(**(settings | {"strategy": "ffa-lora"} | changes))


def test_noised_updates_may_be_refused_by_their_norm() -> None:
    values: dict[str, RunValue] = DEALT | {"strategy": "ffa-lora"}
    assert make_config(**values, dp="local", max_update_norm=9.0).max_update_norm == 9.0


def test_report_of_screening_goes_with_privacy() -> None:
    values: dict[str, RunValue] = DEALT | {"red_team_data": "r"}
    assert make_config(**values, dp="central", screening="report").dp == "central"
