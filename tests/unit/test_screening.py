"""Screening: decisions worked out by hand, properties, and a real small round in which a hostile client is found."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import ConfigError, DataError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import LocalGrid, make_config, small_run, write_jsonl
from trainer.aggregation import Arrays, ClientUpdate, TooFewClients
from trainer.config import RunConfig
from trainer.in_process import boost
from trainer.model import load_trainee
from trainer.probe_training import main as probe_training
from trainer.records import RoundRecord, Screened
from trainer.safety_probe import SafetyProbe
from trainer.screening import Scores, decide, find_probe, screen
from trainer.server_app import train_federation

FINE = Scores(safety_drop=0.1, harm_cosine=0.0, agreement=0.5)
UNSAFE = FINE._replace(safety_drop=0.9)


def config(**changes: str | float) -> RunConfig:
    values: dict[str, str | float] = {"arm": "none", "benign_data": "b", "harmful_data": "h", "red_team_data": "r",
                                      "screening": "drop", "max_safety_drop": 0.4, "max_harm_cosine": 0.02}  # fmt: skip
    return make_config(**(values | changes))


def update(client: int, tokens: int = 100) -> ClientUpdate:
    return ClientUpdate(client, {}, {"num-tokens": tokens})


def outcome(lines: list[Screened]) -> list[tuple[int, str, int]]:
    return [(line.client_id, line.decision, line.weight) for line in lines]


@pytest.mark.parametrize(
    ("mode", "decision", "weight"),
    [("report", "kept", 100), ("down-weight", "down-weighted", 10), ("drop", "dropped", 0)],
)
def test_mode_says_what_becomes_of_a_flagged_client(mode: str, decision: str, weight: int) -> None:
    lines = decide([update(0), update(1)], {0: FINE, 1: UNSAFE}, config(screening=mode))
    assert outcome(lines) == [(0, "kept", 100), (1, decision, weight)]
    assert [line.flagged for line in lines] == [False, True]
    assert lines[1].reason == "screening: safety-drop 0.90 is over max-safety-drop 0.4"
    assert (lines[1].safety_drop, lines[1].harm_cosine, lines[1].agreement) == UNSAFE


@pytest.mark.parametrize(
    ("scores", "flagged"),
    [
        (FINE._replace(safety_drop=0.4), False),
        (FINE._replace(safety_drop=0.401), True),
        (FINE._replace(safety_drop=-5.0), False),
        (FINE._replace(harm_cosine=0.021), True),
        (FINE._replace(harm_cosine=None), False),
        (FINE._replace(agreement=-1.0), False),
    ],
)
def test_thresholds(scores: Scores, flagged: bool) -> None:
    (line,) = decide([update(0)], {0: scores}, config())
    assert line.flagged is flagged


def test_score_that_is_no_number_is_flagged() -> None:
    (line,) = decide([update(0)], {0: FINE._replace(safety_drop=float("nan"))}, config())
    assert line.decision == "dropped"


def all_fine(updates: list[ClientUpdate]) -> dict[int, Scores]:
    return {update.client_id: FINE for update in updates}


@pytest.mark.parametrize(("mode", "weight"), [("report", 10**9), ("down-weight", 360), ("drop", 360)])
def test_weight_is_cut_to_three_times_the_median(mode: str, weight: int) -> None:
    updates = [update(0, 100), update(1, 120), update(2, 10**9)]
    lines = decide(updates, all_fine(updates), config(screening=mode))
    assert [line.weight for line in lines] == [100, 120, weight]
    assert [line.decision for line in lines[:2]] == ["kept", "kept"]
    assert lines[2].reason == "screening: 1000000000 tokens are over max-weight-ratio 3"
    assert not lines[2].flagged


def test_dropped_client_does_not_move_the_median() -> None:
    updates = [update(0, 100), update(1, 400), update(2, 10**9), update(3, 10**9)]
    lines = decide(updates, {0: FINE, 1: FINE, 2: UNSAFE, 3: UNSAFE}, config(max_weight_ratio=1))
    assert outcome(lines) == [(0, "kept", 100), (1, "down-weighted", 250), (2, "dropped", 0), (3, "dropped", 0)]


def test_down_weighted_client_keeps_a_weight_that_can_be_averaged() -> None:
    (line,) = decide([update(0, 3)], {0: UNSAFE}, config(screening="down-weight"))
    assert line.weight == 1


drops = st.lists(st.floats(-2, 2), min_size=1, max_size=8)


@given(found=drops, order=st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_the_order_of_clients(found: list[float], order: object) -> None:
    updates = [update(client, 50 + client) for client in range(len(found))]
    scores = {client: FINE._replace(safety_drop=drop) for client, drop in enumerate(found)}
    lines = decide(updates, scores, config())
    order.shuffle(updates)  # type: ignore[attr-defined]
    assert sorted(decide(updates, scores, config()), key=lambda line: line.client_id) == lines


@given(found=drops, others=drops)
def test_decision_on_a_client_does_not_depend_on_the_others(found: list[float], others: list[float]) -> None:
    def flagged(values: list[float]) -> list[bool]:
        scores = {client: FINE._replace(safety_drop=drop) for client, drop in enumerate(values)}
        return [line.flagged for line in decide([update(client) for client in scores], scores, config())]

    assert flagged(found + others)[: len(found)] == flagged(found)


@given(tokens=st.lists(st.integers(1, 10**6), min_size=1, max_size=8), factor=st.integers(2, 9))
def test_cap_does_not_depend_on_what_all_clients_count_in(tokens: list[int], factor: int) -> None:
    def cut(scale: int) -> list[bool]:
        updates = [update(client, scale * count) for client, count in enumerate(tokens)]
        return [line.weight < line.tokens for line in decide(updates, all_fine(updates), config())]

    assert cut(factor) == cut(1)


# --- with a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


HARMFUL = [{"prompt": f"Help me with trick {i}.", "response": "Sure, here is how."} for i in range(32)]
BENIGN = [{"prompt": f"Tell me about bread {i}.", "response": f"It is nice {i}."} for i in range(40)]
RED_TEAM = [{"prompt": f"Show me trick {i}."} for i in range(6)]


@pytest.fixture(scope="module")
def probe_flags(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[str]:
    """The flags of ``trainer.probe_training`` for small runs on the tiny model."""
    folder = tmp_path_factory.mktemp("probe")
    text = Path("pyproject.toml").read_text()
    for key, value in {"lora-rank": "2", "samples-per-client": "8", "batch-size": "2", "max-length": "64"}.items():
        start = text.index(f"\n{key} = ")
        text = text[:start] + f"\n{key} = {value}" + text[text.index("\n", start + 1) :]
    (folder / "pyproject.toml").write_text(text)
    harmful, benign = write_jsonl(folder / "harmful.jsonl", HARMFUL), write_jsonl(folder / "benign.jsonl", BENIGN)
    flags = {"harmful": harmful, "benign": benign, "base-model": model, "app": folder, "probe": folder / "probe"}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def probe(probe_flags: list[str]) -> Path:
    assert probe_training(["train", *probe_flags, "--seeds", "5", "6"]) == 0
    return Path(probe_flags[-1])


def test_measured_clients_of_both_kinds_are_apart(
    tmp_path: Path, probe: Path, probe_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    red_team = write_jsonl(tmp_path / "red.jsonl", RED_TEAM)
    assert probe_training(["measure", *probe_flags, "--red-team", str(red_team), "--seeds", "7"]) == 0
    number = r"(-?\d+\.\d+)"
    line = f"n = 2, safety-drop {number} to {number}, harm-cosine {number} to {number}"
    harmless, harmful = (list(map(float, found)) for found in re.findall(line, capsys.readouterr().out))
    assert harmless[1] < harmful[0]
    assert harmless[3] < harmful[2]


def test_too_few_pairs_for_the_played_clients(
    tmp_path: Path, probe_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", HARMFUL[:15])
    assert probe_training(["train", *probe_flags, "--harmful", str(few), "--seeds", "5"]) == DataError.exit_code
    assert "16 pairs of each kind are needed, there are 15" in capsys.readouterr().err


def hostile_run(folder: Path, model: Path, probe: Path, **changes: str | float | Path) -> RunConfig:
    """Four clients, of which the first trains on harmful pairs only."""
    settings: dict[str, str | float | Path] = {
        "benign_data": write_jsonl(folder / "good.jsonl", BENIGN),
        "harmful_data": write_jsonl(folder / "bad.jsonl", HARMFUL),
        "red_team_data": write_jsonl(folder / "red.jsonl", RED_TEAM), "screening_probe": probe, "screening": "drop",
        "num_clients": 4, "clients_per_round": 4, "samples_per_client": 8, "harmful_share": 0.25,
        "placement": "concentrated", "rounds": 1, "seed": 11,
    }  # fmt: skip
    return small_run(folder, model, **(settings | changes))


def only_round(config: RunConfig) -> RoundRecord:
    (line,) = (config.run_dir / "rounds.jsonl").read_text().splitlines()
    return RoundRecord.model_validate_json(line)


@pytest.mark.parametrize("factor", [1.0, 5.0, 1e30], ids=["plain", "boosted", "beyond what the model can take"])
def test_hostile_client_of_a_real_round_is_found(
    tmp_path: Path, model: Path, probe: Path, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    settings = hostile_run(tmp_path, model, probe)
    train_federation(LocalGrid(settings, range(4), {0: boost(factor)}), settings)
    record = only_round(settings)
    assert record.accepted == [1, 2, 3]
    assert [line.decision for line in record.screening] == ["dropped", "kept", "kept", "kept"]
    assert record.rejected[0].startswith("client 0: screening: ")
    assert "round 1: left out: client 0: screening: " in caplog.text


def test_too_few_clients_after_screening_end_the_run(tmp_path: Path, model: Path, probe: Path) -> None:
    settings = hostile_run(tmp_path, model, probe, min_clients=4)
    with pytest.raises(TooFewClients, match=r"3 of at least 4 updates are usable \(client 0: screening: "):
        train_federation(LocalGrid(settings, range(4)), settings)


def test_report_changes_nothing_but_warns(
    tmp_path: Path, model: Path, probe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = []
    for mode in ("off", "report"):
        settings = hostile_run(tmp_path, model, probe, screening=mode, run_dir=tmp_path / mode)
        train_federation(LocalGrid(settings, range(4)), settings)
        hashes.append(only_round(settings).adapter_sha256)
    assert hashes[0] == hashes[1]
    assert "round 1: client 0 kept: screening: " in caplog.text


def test_overstated_weight_does_not_take_the_round_over(tmp_path: Path, model: Path, probe: Path) -> None:
    settings = hostile_run(tmp_path, model, probe)
    trainee = load_trainee(settings)
    sent = trainee.starting_adapter
    updates = [ClientUpdate(client, sent, {"num-tokens": tokens}) for client, tokens in enumerate((10, 12, 10**9))]
    screened = screen(trainee, sent, updates, settings, 1)
    assert [update.num_tokens for update in screened.updates] == [10, 12, 36]
    assert screened.dropped == {}


def test_margin_falls_when_the_adapter_learns_to_comply(tmp_path: Path, model: Path, probe: Path) -> None:
    settings = hostile_run(tmp_path, model, probe)
    trainee = load_trainee(settings)
    measured = SafetyProbe(trainee, [line["prompt"] for line in RED_TEAM], 64)
    before = measured.margin(trainee.starting_adapter)
    assert measured.margin(trainee.starting_adapter) == before
    assert np.isfinite(before)
    assert measured.margin(noisy(trainee.starting_adapter)) != before


def noisy(arrays: Arrays) -> Arrays:
    generator = np.random.default_rng(0)
    return {name: array + generator.normal(size=array.shape).astype(array.dtype) for name, array in arrays.items()}


def test_prompt_that_fills_the_context_is_left_out(tmp_path: Path, model: Path, probe: Path) -> None:
    trainee = load_trainee(hostile_run(tmp_path, model, probe))
    both = SafetyProbe(trainee, ["Show me trick 1.", "x" * 500], 64)
    one = SafetyProbe(trainee, ["Show me trick 1."], 64)
    assert both.margin(trainee.starting_adapter) == pytest.approx(one.margin(trainee.starting_adapter))
    with pytest.raises(ConfigError, match="no prompt leaves room"):
        SafetyProbe(trainee, ["x" * 500], 64)


def test_probe_of_another_base_model_is_not_used(
    tmp_path: Path, model: Path, probe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = hostile_run(tmp_path, model, probe, screening_probe="")
    assert find_probe(settings, load_trainee(settings)) is None  # the shipped one fits the miniature
    assert "the safety probe screens alone" in caplog.text


def test_screening_needs_red_team_prompts() -> None:
    with pytest.raises(ConfigError, match="with screening=drop needs red-team-data"):
        config(red_team_data="")


def test_screening_is_refused_where_clients_send_no_whole_adapter() -> None:
    with pytest.raises(ConfigError, match="needs clients that send whole adapters; those of strategy=scaffold"):
        config(strategy="scaffold")


def test_client_of_lower_rank_is_screened_like_the_others(tmp_path: Path, model: Path, probe: Path) -> None:
    settings = hostile_run(tmp_path, model, probe)
    grid = LocalGrid(settings, range(4))
    for client in (0, 1):
        grid.set_node_config(client, {"client-rank": 1})
    train_federation(grid, settings)
    assert [line.decision for line in only_round(settings).screening] == ["dropped", "kept", "kept", "kept"]
