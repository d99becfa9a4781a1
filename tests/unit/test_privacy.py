"""Client-level privacy: clipping and noise worked out by hand, epsilon against exact values, ledgers, resume."""

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, Message
from scipy import stats
from scipy.optimize import brentq

from services.contracts.adapters import read_manifest
from services.contracts.errors import ConfigError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import make_config, small_run
from tests.unit.test_strategies import floats, lora, update
from tests.unit.test_trainer_rounds import rounds_of, train
from trainer import privacy, run_folder
from trainer.aggregation import Arrays, distance
from trainer.config import RunConfig, RunValue
from trainer.privacy import Mechanism, NoisedMean, epsilon_of, secure_normal
from trainer.records import TRAINING_COUNTS
from trainer.run_folder import read_result
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


def exact_epsilon(releases: int, noise_multiplier: float, delta: float) -> float:
    """Balle and Wang (arXiv 1805.06083), theorem 8: what a composition of Gaussian mechanisms really costs."""
    mu = 2 * math.sqrt(releases) / noise_multiplier
    normal = stats.norm

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + normal.logcdf(-mu / 2 - epsilon / mu))
        return float(normal.cdf(mu / 2 - epsilon / mu) - tail - delta)

    return float(brentq(excess, 0, 1e4))


@pytest.mark.parametrize("releases", [1, 3, 100])
@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0, 8.0, 50.0])
def test_epsilon_is_an_upper_bound_close_to_the_exact_value(releases: int, noise_multiplier: float) -> None:
    exact = exact_epsilon(releases, noise_multiplier, 1e-5)
    assert exact <= epsilon_of(releases, noise_multiplier, 1e-5) <= 1.2 * exact


def test_epsilon_of_a_known_case() -> None:
    """One release at z / 2 = 1: min over a of a / 2 + (log(1/delta) - log a) / (a - 1) + log(1 - 1/a), by hand."""
    orders = np.linspace(1.01, 60, 100_000)
    bound = orders / 2 + (math.log(1e5) - np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    assert epsilon_of(1, 2.0, 1e-5) == pytest.approx(bound.min(), rel=1e-3)
    assert 4.37 < epsilon_of(1, 2.0, 1e-5) < 4.9  # the exact value is 4.377, the classic conversion gives 5.30


@pytest.mark.parametrize("releases", [1, privacy.MAX_RELEASES])
@pytest.mark.parametrize("noise_multiplier", [0.01, 1000.0])
def test_epsilon_is_finite_at_the_extremes(releases: int, noise_multiplier: float) -> None:
    assert 0 <= epsilon_of(releases, noise_multiplier, 1e-5) < math.inf


def private_strategy(name: str, **changes: RunValue) -> Strategy:
    values: dict[str, RunValue] = {"strategy": name, "arm": "none", "benign_data": "b", "harmful_data": "h"}
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
    lines = (config.run_dir / privacy.LEDGER).read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 1, 2]


def test_resumed_run_does_not_forget_what_was_spent(tmp_path: Path, model: Path) -> None:
    train(private_run(tmp_path, model, rounds=1))
    whole = private_run(tmp_path, model)
    train(whole)
    assert [releases for releases, _ in spent(whole)] == [1, 2]


def test_run_whose_ledger_is_lost_does_not_go_on(tmp_path: Path, model: Path) -> None:
    train(private_run(tmp_path, model, rounds=1))
    whole = private_run(tmp_path, model)
    (whole.run_dir / privacy.LEDGER).unlink()
    with pytest.raises(ConfigError, match=r"holds 1 releases after 2 rounds: without the others epsilon is unknown"):
        train(whole)


def test_client_under_local_privacy_counts_its_releases_itself(tmp_path: Path, model: Path) -> None:
    """A client that was asked before, by an attempt that left no trace at the coordinator, has spent more."""
    config = private_run(tmp_path, model, "local", rounds=1)
    for _ in range(4):
        privacy.note_release(config.run_dir / "clients" / "1", 1)
    train(config)
    assert [releases for releases, _ in spent(config)] == [5]


def test_update_under_local_privacy_is_noise_before_it_leaves_the_client(tmp_path: Path, model: Path) -> None:
    changes: list[float] = []
    sizes: list[int] = []

    def listen(question: Message, reply: Message) -> Message:
        sent, back = (arrays_of(message) for message in (question, reply))
        changes.append(distance(back, sent))
        sizes.append(sum(array.size for array in back.values()))
        assert set(reply.content.metric_records["metrics"]) == {*TRAINING_COUNTS, privacy.RELEASES}
        return reply

    config = private_run(tmp_path, model, "local", rounds=1, dp_noise_multiplier=100.0)
    train(config, tamper=dict.fromkeys(range(3), listen))
    # The norm of k normal numbers of deviation 1 is sqrt(k) to within 1 (standard error 0.7), and the update adds 0.01.
    assert changes == pytest.approx([math.sqrt(sizes[0])] * 3, abs=5)


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
        ({"secure_aggregation": True, "dp": "local"}, "Flower has SecAgg\\+ for its legacy workflow only"),
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
    settings: dict[str, RunValue] = {"arm": "none", "benign_data": "b", "harmful_data": "h", "dp": "central"}
    with pytest.raises(ConfigError, match=reason):
        make_config(**(settings | {"strategy": "ffa-lora"} | changes))


def test_noised_updates_may_be_refused_by_their_norm() -> None:
    values: dict[str, RunValue] = {"arm": "none", "benign_data": "b", "harmful_data": "h", "strategy": "ffa-lora"}
    assert make_config(**values, dp="local", max_update_norm=9.0).max_update_norm == 9.0


def test_report_of_screening_goes_with_privacy() -> None:
    values: dict[str, RunValue] = {"arm": "none", "benign_data": "b", "harmful_data": "h", "red_team_data": "r"}
    assert make_config(**values, dp="central", screening="report").dp == "central"
