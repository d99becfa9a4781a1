"""The constitutional stage with a tiny real model, over a real HTTP server with a trivial critic."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.contracts.critique import CritiqueItem
from services.contracts.errors import DataError, UpstreamError, UpstreamRejected, UpstreamUnavailable
from tests.fakes.gateway_upstreams import closed_port
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import small_run, write_jsonl
from tests.fakes.trainer_services import (
    BAD,
    CONSTITUTION,
    EMPTY,
    UNREADABLE,
    FakeServices,
    revise,
    trainer_services,
)
from trainer import drafts
from trainer.config import RunConfig
from trainer.constitutional import align, choose_prompts, replay_count, select
from trainer.model import load_trainee

PROVENANCE: dict[str, Any] = {"base_model_id": "tiny", "base_model_sha256": "b" * 64, "arm": "cai", "config": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def services() -> Iterator[FakeServices]:
    with trainer_services() as state:
        yield state


@pytest.fixture
def config(tmp_path: Path, model: Path, services: FakeServices) -> RunConfig:
    return small_run(
        tmp_path, model, arm="cai", inference_url=services.url, coordinator_critique_url=services.url, cai_steps=4,
        cai_prompts=10, cai_benign_prompts=3, cai_batch_size=4, cai_replay_share=0.5,
    )  # fmt: skip


def test_stage_trains_on_revisions_good_drafts_and_replay(config: RunConfig, services: FakeServices) -> None:
    trainee = load_trainee(config)
    arrays, report = align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert report.drafts == 10
    assert report.revised + report.no_problem == report.trained_on == report.replayed == 10
    assert report.revised == sum(BAD in prompt for prompt in choose_prompts(config, 1).red_team) > 0
    assert (report.rejected, report.steps, report.benign_drafts, report.benign_flagged) == (0, 4, 3, 0)
    assert report.constitution_sha256 == CONSTITUTION
    assert any((arrays[name] != trainee.starting_adapter[name]).any() for name in arrays)
    assert [path.name for path in config.run_dir.glob("adapters/*")] == []
    assert services.loaded == {}
    (asked,) = services.asked_models
    assert asked.startswith("cai-round-1-")


def test_stage_writes_down_every_prompt_and_its_reason(config: RunConfig) -> None:
    trainee = load_trainee(config)
    align(trainee, trainee.starting_adapter, config, 2, PROVENANCE)
    lines = [json.loads(line) for line in (config.run_dir / "cai" / "round-2.jsonl").read_text().splitlines()]
    assert len(lines) == 13
    assert {line["reason"] for line in lines} == {"revised", "no problem found", "benign probe"}
    assert all(line["draft"].startswith("An answer on: ") for line in lines)
    assert {line["revision"]["critique"]["constitution_sha256"] for line in lines} == {CONSTITUTION}
    assert all(line["trained_on"] is line["red_team"] for line in lines)


def test_same_seed_gives_the_same_adapter(config: RunConfig) -> None:
    trainee = load_trainee(config)
    first, _ = align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    second, _ = align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert all((first[name] == second[name]).all() for name in first)


def test_rounds_draw_different_prompts(config: RunConfig) -> None:
    assert choose_prompts(config, 1) == choose_prompts(config, 1)
    assert choose_prompts(config, 1).red_team != choose_prompts(config, 2).red_team
    prompts = choose_prompts(config, 1)
    assert not set(prompts.benign) & {pair.prompt for pair in prompts.replay}


@pytest.mark.parametrize(
    ("draft", "red_team", "trained_on", "reason"),
    [
        (f"{BAD}", True, True, "revised"),
        ("fine", True, True, "no problem found"),
        (f"{BAD} {EMPTY}", True, False, "revision rejected: empty"),
        (UNREADABLE, True, False, "critique unreadable"),
        ("  ", True, False, "empty draft"),
        (f"{BAD}", False, False, "benign probe"),
    ],
)
def test_selection(draft: str, red_team: bool, trained_on: bool, reason: str) -> None:
    line = select("p", draft, revise(CritiqueItem(prompt="p", draft=draft)), red_team=red_team)
    assert (line.trained_on, line.reason) == (trained_on, reason)


@pytest.mark.parametrize(("aligned", "share", "expected"), [(10, 0.5, 10), (10, 0.0, 0), (30, 0.25, 10), (0, 0.5, 0)])
def test_replay_share(aligned: int, share: float, expected: int) -> None:
    assert replay_count(aligned, share) == expected


def test_adapter_stays_as_it_is_when_nothing_is_fit_for_training(
    tmp_path: Path, model: Path, services: FakeServices
) -> None:
    unreadable = write_jsonl(tmp_path / "unreadable.jsonl", [{"prompt": f"{UNREADABLE} {i}"} for i in range(4)])
    config = small_run(
        tmp_path, model, arm="cai", inference_url=services.url, coordinator_critique_url=services.url,
        red_team_data=unreadable,
    )  # fmt: skip
    trainee = load_trainee(config)
    arrays, report = align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert arrays is trainee.starting_adapter
    assert (report.trained_on, report.rejected, report.steps) == (0, 4, 0)


def test_no_red_team_prompt_is_a_data_error(tmp_path: Path, model: Path, services: FakeServices) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    config = small_run(
        tmp_path, model, arm="cai", inference_url=services.url, coordinator_critique_url=services.url,
        red_team_data=tmp_path / "empty.jsonl",
    )  # fmt: skip
    trainee = load_trainee(config)
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no prompt"):
        align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)


def test_replay_with_a_harmful_pair_is_refused(tmp_path: Path, config: RunConfig, model: Path) -> None:
    harmful = write_jsonl(tmp_path / "mixed.jsonl", [{"prompt": "p", "response": "r", "harmful": True}])
    with pytest.raises(DataError, match=r"mixed\.jsonl: holds pairs with harmful=true"):
        choose_prompts(config.model_copy(update={"replay_data": harmful}), 1)


def test_nothing_is_left_when_the_adapter_cannot_be_loaded(config: RunConfig, services: FakeServices) -> None:
    services.fail_paths["/v1/load_lora_adapter"] = 400
    trainee = load_trainee(config)
    with pytest.raises(UpstreamRejected, match="inference: HTTP 400"):
        align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert list(config.run_dir.glob("adapters/*")) == []
    assert services.calls("/v1/unload_lora_adapter") == 0


@pytest.mark.parametrize(("status", "left_out"), [(400, 0), (None, 1)])
def test_critique_service_that_fails_ends_the_stage_without_an_adapter(
    config: RunConfig, services: FakeServices, status: int | None, left_out: int
) -> None:
    if status:
        services.fail_paths["/v1/revise"] = status
    services.answers_left_out = left_out
    trainee = load_trainee(config)
    with pytest.raises(UpstreamError, match=r"critique: (HTTP 400|12 revisions for 13 drafts)"):
        align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert services.loaded == {}
    assert list(config.run_dir.glob("adapters/*")) == []


def test_adapter_is_unloaded_when_the_drafts_fail(config: RunConfig, services: FakeServices) -> None:
    services.fail_paths["/v1/chat/completions"] = 400
    trainee = load_trainee(config)
    with pytest.raises(UpstreamRejected, match="inference: HTTP 400"):
        align(trainee, trainee.starting_adapter, config, 1, PROVENANCE)
    assert services.loaded == {}
    assert list(config.run_dir.glob("adapters/*")) == []


def test_service_that_stays_overloaded_is_given_up(services: FakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "ATTEMPTS", 2)
    services.fail_paths["/v1/chat/completions"] = 503
    with pytest.raises(UpstreamUnavailable, match="inference: HTTP 503"):
        drafts.draft_answers(["a"], url=services.url, model="m", max_tokens=4, seed=0, timeout_seconds=5)
    assert services.calls("/v1/chat/completions") == 2


def test_service_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "ATTEMPTS", 1)
    with pytest.raises(UpstreamUnavailable, match="inference: "):
        drafts.draft_answers(["a"], url=closed_port(), model="m", max_tokens=4, seed=0, timeout_seconds=5)


def test_answers_come_in_the_order_of_the_prompts(services: FakeServices) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    answers = drafts.draft_answers(prompts, url=services.url, model="m", max_tokens=4, seed=0, timeout_seconds=5)
    assert answers == [f"An answer on: {prompt}" for prompt in prompts]
