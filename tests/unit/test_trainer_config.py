"""The run configuration: agreement with pyproject, unknown keys, contradictions, and whose word counts."""

import tomllib
from pathlib import Path

import pytest

from services.contracts.errors import ConfigError
from tests.fakes.trainer_runs import ROOT, make_config, run_values
from trainer.config import Arm, RunConfig, RunValue, default_run_config, parse_run_config

DATA: dict[str, RunValue] = {
    "benign_data": "b.jsonl",
    "harmful_data": "h.jsonl",
    "red_team_data": "r",
    "replay_data": "p",
}


def test_pyproject_lists_exactly_the_keys_that_exist() -> None:
    keys = {name.replace("_", "-") for name in RunConfig.model_fields}
    assert set(default_run_config(ROOT / "pyproject.toml")) == keys


def test_pyproject_names_the_two_flower_apps() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "trainer.server_app:app", "clientapp": "trainer.client_app:app"}
    assert app["fab-include"] == ["trainer/*.py", "trainer/strategies/*.py"]


def test_defaults_with_data_are_valid() -> None:
    config = make_config(**DATA)
    assert config.arm is Arm.FILTER_CAI
    assert config.base_model is None
    assert config.min_filter_recall == 0.5


def test_unknown_key_is_refused_by_name_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown run-config key 'harmful-shar'; did you mean 'harmful-share'\?"):
        make_config(harmful_shar=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harmful_share": 1.5}, "harmful-share: Input should be less than or equal to 1"),
        ({"arm": "both"}, "arm: Input should be 'none', 'filter', 'cai' or 'filter\\+cai'"),
        ({"rounds": "many"}, "rounds: Input should be a valid integer"),
        ({"min_filter_recall": 1.5}, "min-filter-recall: Input should be less than or equal to 1"),
        ({"learning_rate": float("inf")}, "learning-rate: Input should be a finite number"),
        ({"min_clients": 9}, r"min-clients \(9\) <= clients-per-round \(8\) <= num-clients \(8\)"),
        ({"clients_per_round": 9}, "<= num-clients"),
        ({"benign_data": ""}, "^run-config: set benign-data and harmful-data"),
        ({"harmful_data": ""}, "harmful-share=0.3 needs harmful-data"),
        ({"shard_data": "/s/{shard}.jsonl"}, "shard-data \\(own data\\) contradict benign-data"),
        ({"safety_url": ""}, "arm=filter\\+cai with curation-mode=drop needs safety-url"),
        ({"curation_mode": "revise", "critique_url": ""}, "with curation-mode=revise needs critique-url"),
        ({"inference_url": ""}, "needs inference-url"),
        ({"coordinator_critique_url": "", "red_team_data": ""}, "needs coordinator-critique-url, red-team-data"),
        ({"replay_data": ""}, "needs replay-data"),
        ({"placement": "clustered"}, "placement: Input should be 'spread' or 'concentrated'"),
        ({"strategy": "fedsgd"}, "strategy: Input should be 'fedavg', 'fedprox', "),
        ({"strategy": "fedprox"}, "strategy=fedprox with proximal-mu=0.0: fedprox needs it"),
        ({"proximal_mu": 0.1}, "strategy=fedavg with proximal-mu=0.1: fedprox needs it, no other has it"),
        ({"server_learning_rate": 0.1}, "strategy=fedavg has no server-learning-rate; fedavgm, scaffold, "),
        ({"strategy": "fedex-lora"}, r"strategy=fedex-lora needs a residual-rank from 1 to lora-rank - 1 \(7\)"),
        ({"strategy": "flora", "residual_rank": 8}, "strategy=flora needs a residual-rank from 1 to"),
        ({"residual_rank": 2}, "residual-rank is for strategy=fedex-lora and flora; fedavg has no residual"),
        ({"client_rank": 9}, "client-rank=9 is more than lora-rank=8"),
        ({"client_rank": 4, "strategy": "ffa-lora"}, "strategy=ffa-lora needs one rank everywhere; client-rank is for"),
        ({"strategy": "krum"}, "strategy=krum with malicious-clients=0: median, trimmed-mean, .* need it"),
        ({"malicious_clients": 1}, "strategy=fedavg with malicious-clients=1: .* no other has it"),
        (
            {"strategy": "bulyan", "malicious_clients": 2, "min_clients": 8},
            "strategy=bulyan withstands malicious-clients=2 only among 11 or more updates; min-clients is 8",
        ),
    ],
)
def test_bad_value_or_contradiction_is_refused(changes: dict[str, RunValue], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**(DATA | changes))


def test_own_data_needs_a_file_for_each_client() -> None:
    with pytest.raises(ConfigError, match=r"shard-data needs \{shard\}"):
        make_config(shard_data="/data/all.jsonl")
    assert make_config(shard_data="/data/{shard}.jsonl", arm="none").max_tokens_per_client > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedprox", "proximal_mu": 0.01},
        {"strategy": "flora", "residual_rank": 4},
        {"strategy": "flexlora", "client_rank": 4},
        {"strategy": "ffa-lora", "client_rank": 8},
        {"strategy": "krum", "malicious_clients": 1, "min_clients": 5},
    ],
)
def test_strategy_with_what_it_needs_is_valid_and_part_of_the_runs_identity(changes: dict[str, RunValue]) -> None:
    config = make_config(**(DATA | changes))
    identity = config.identity()
    assert identity["strategy"] == changes["strategy"]
    assert "client-rank" not in identity  # a silo's own
    assert {"residual-rank", "proximal-mu", "local-optimizer", "max-update-norm"} <= identity.keys()


@pytest.mark.parametrize(("strategy", "rate"), [("fedavgm", 1.0), ("fedadam", 1e-3), ("scaffold", 1.0)])
def test_server_learning_rate_has_a_default_by_strategy(strategy: str, rate: float) -> None:
    assert make_config(**DATA, strategy=strategy).server_rate == rate
    assert make_config(**DATA, strategy=strategy, server_learning_rate=0.5).server_rate == 0.5


def test_silo_chooses_its_own_rank() -> None:
    config = parse_run_config(run_values(**DATA), silo={"client-rank": 2})
    assert (config.own_rank, config.lora_rank) == (2, 8)
    assert make_config(**DATA).own_rank == 8


def test_arm_without_a_stage_needs_none_of_its_services() -> None:
    config = make_config(arm="none", benign_data="b", harmful_data="h", safety_url="", inference_url="")
    assert not config.arm.filters
    assert not config.arm.constitutional


def test_silo_decides_where_its_data_goes_and_nothing_else() -> None:
    silo: dict[str, RunValue] = {"safety-url": "http://own:1", "shard-data": "", "partition-id": 3, "rounds": 99}
    config = parse_run_config(run_values(**DATA), silo)
    assert config.safety_url == "http://own:1"
    assert config.rounds != 99


OWN_DATA: dict[str, RunValue] = {"shard_data": "/s/{shard}.jsonl", "red_team_data": "r", "replay_data": "p"}


def test_coordinator_cannot_send_a_silos_own_data_anywhere() -> None:
    with pytest.raises(ConfigError, match="needs safety-url"):
        parse_run_config(run_values(**OWN_DATA), silo={"shard-data": "/own/{shard}.jsonl"})
    silo: dict[str, RunValue] = {"shard-data": "/own/{shard}.jsonl", "safety-url": "http://own:1"}
    config = parse_run_config(run_values(**OWN_DATA, client_dir="/shared"), silo)
    assert (config.safety_url, config.critique_url, config.client_dir) == ("http://own:1", None, None)


def test_identity_leaves_out_what_may_change_when_a_run_is_continued() -> None:
    one = make_config(**DATA)
    moved: dict[str, RunValue] = {"rounds": 9, "run_dir": "elsewhere", "safety_url": "http://moved:1"}
    other = make_config(**(DATA | moved | {"min_filter_recall": 0.1}))
    assert one.identity() == other.identity()
    assert one.identity() != make_config(**(DATA | {"seed": 1})).identity()


def test_missing_section_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ConfigError, match=r"no readable \[tool.flwr.app.config\]"):
        default_run_config(tmp_path / "pyproject.toml")
