"""A coordinator that is killed in any phase of a round, or meets an error of the SuperLink: the run goes on."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from tests.fakes.killed_runs import Point, run_until
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import LocalGrid, small_run, train
from tests.fakes.trainer_services import FakeServices, trainer_services
from tests.unit.test_trainer_rounds import context_of, rounds_of
from trainer import run_folder
from trainer.config import RunConfig, RunValue
from trainer.run_folder import RunFolderInUse, holding, read_result
from trainer.server_app import main

EVERYWHERE = {
    "before the roll call": Point("trainer.exchange:connected"),
    "while clients curate": Point("trainer.curation:write_atomically", finished=0),
    "while clients train": Point("trainer.local_training:train_locally"),
    "waiting for replies": Point("trainer.exchange:Fleet._pull"),
    "taking replies": Point("trainer.server_app:check_update", after=True),
    "screening": Point("trainer.safety_probe:SafetyProbe.margin", after=True),
    "aggregating": Point("trainer.server_app:require_enough"),
    "drafting answers": Point("trainer.constitutional:draft_answers"),
    "revising answers": Point("trainer.constitutional:_revise"),
    "aligning": Point("trainer.constitutional:train_sft", after=True),
    "writing the adapter": Point("trainer.registry:save"),
    "with the adapter written": Point("trainer.run_folder:write_adapter", after=True),
    "replacing the state": Point("trainer.run_folder:replace_file"),
    "before the round's line": Point("trainer.run_folder:append_line"),
    "after the first round's line": Point("trainer.run_folder:append_line", finished=0, after=True),
    "between rounds": Point("trainer.server_app:report_progress"),
    "after the last round": Point("trainer.run_folder:write_result", finished=2),
}  # fmt: skip
CLIENT_STATE = {
    "before its state": Point("trainer.local_training:write_control"),
    "after its state": Point("trainer.local_training:write_control", after=True),
    "before the round's line": Point("trainer.run_folder:append_line"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def services() -> Iterator[FakeServices]:
    with trainer_services() as state:
        yield state


def every_stage(folder: Path, model: Path, services: FakeServices) -> RunConfig:
    """A run in which every phase has work to do."""
    return small_run(
        folder, model, arm="filter+cai", strategy="fedavgm", screening="down-weight", screening_prompts=2,
        safety_url=services.url, inference_url=services.url, coordinator_critique_url=services.url, harmful_share=0.25,
        cai_steps=2, cai_prompts=4, cai_benign_prompts=1,
    )  # fmt: skip


def scaffold(folder: Path, model: Path) -> RunConfig:
    """A run whose clients keep a state of their own."""
    return small_run(folder, model, strategy="scaffold")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, model: Path, services: FakeServices
) -> dict[str, list[RunValue | None]]:
    """The results that every other run is compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    results = {}
    for name in ("every stage", "scaffold"):
        (folder / name).mkdir()
    for name, config in (
        ("every stage", every_stage(folder / "every stage", model, services)),
        ("scaffold", scaffold(folder / "scaffold", model)),
    ):
        train(config)
        results[name] = result_of(config)
    return results


def result_of(config: RunConfig) -> list[RunValue | None]:
    """What of a run must not depend on kills: the hashes of each round's adapter and state."""
    return [hash for record in rounds_of(config) for hash in (record.adapter_sha256, record.strategy_state_sha256)]


def kill_and_resume(config: RunConfig, point: Point) -> LocalGrid:
    file = config.run_dir / "rounds.jsonl"
    run_until(point, train, config, rounds=file)
    before = file.read_bytes() if file.exists() else b""
    grid = train(config)
    assert file.read_bytes().startswith(before)
    assert len(grid.rounds) == config.rounds - len(before.splitlines())  # finished rounds are not done again
    result = read_result(config.run_dir)
    assert result is not None
    assert result.status == "completed"
    assert list(config.run_dir.rglob("*.part")) == []
    assert {path.name for path in (config.run_dir / "adapters").iterdir()} == {"round-0", "round-1", "round-2"}
    return grid


@pytest.mark.parametrize("point", EVERYWHERE.values(), ids=EVERYWHERE)
def test_run_that_is_killed_goes_on_and_gives_the_same_result(
    tmp_path: Path, model: Path, services: FakeServices, undisturbed: dict[str, list[RunValue | None]], point: Point
) -> None:
    config = every_stage(tmp_path, model, services)
    kill_and_resume(config, point)
    assert result_of(config) == undisturbed["every stage"]
    assert services.loaded == {}  # nothing is left in the inference service


@pytest.mark.parametrize("point", CLIENT_STATE.values(), ids=CLIENT_STATE)
def test_run_that_is_killed_while_clients_write_their_state_gives_the_same_result(
    tmp_path: Path, model: Path, undisturbed: dict[str, list[RunValue | None]], point: Point
) -> None:
    config = scaffold(tmp_path, model)
    kill_and_resume(config, point)
    assert result_of(config) == undisturbed["scaffold"]


@pytest.mark.parametrize(
    "error",
    [
        httpx.HTTPStatusError("locked", request=httpx.Request("POST", "https://l"), response=httpx.Response(500)),
        ObjectPushError("object", 1, "session"),
        ObjectPullError("object", "locked"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_superlink_leaves_no_result_so_that_the_run_is_submitted_again(
    tmp_path: Path, model: Path, error: Exception
) -> None:
    config = small_run(tmp_path, model)
    grid = LocalGrid(config, range(3))

    def locked() -> list[NodeInfo]:
        raise error

    grid.get_nodes = locked  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        main(grid, context_of(config))
    assert read_result(config.run_dir) is None


def test_second_coordinator_in_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.0)
    with holding(tmp_path), pytest.raises(RunFolderInUse, match="is in use by another run"), holding(tmp_path):
        pass
