"""Curation against a real HTTP server with a trivial classifier and critic."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.common.http import ServiceClient
from services.contracts.errors import ConfigError, UpstreamUnavailable
from services.contracts.verdicts import Accuracy, CalibrationInfo
from tests.fakes.gateway_upstreams import closed_port
from tests.fakes.trainer_services import BAD, EMPTY, STUBBORN, UNSCORABLE, FakeServices, trainer_services
from trainer.curation import REFUSALS, CurationReport, Mode, curate, curate_once, refusal_for
from trainer.shards import Pair


@pytest.fixture
def services() -> Iterator[FakeServices]:
    with trainer_services() as state:
        yield state


@pytest.fixture
def safety(services: FakeServices) -> Iterator[ServiceClient]:
    with ServiceClient("safety", services.url, attempts=1) as client:
        yield client


@pytest.fixture
def critique(services: FakeServices) -> Iterator[ServiceClient]:
    with ServiceClient("critique", services.url, attempts=1) as client:
        yield client


def pair(response: str, *, harmful: bool | None = None) -> Pair:
    return Pair(prompt=f"About {response}", response=response, harmful=harmful)


SHARD = [
    pair("fine", harmful=False),
    pair(f"one {BAD}", harmful=True),
    pair("sly", harmful=True),  # harmful, but the classifier does not see it
    pair(f"{BAD} with a harmless label", harmful=False),
    pair(UNSCORABLE, harmful=False),
    pair("also fine"),
]


def test_drop_keeps_what_is_safe_and_nothing_else(safety: ServiceClient) -> None:
    kept, report = curate(SHARD, "drop", safety, None)
    assert kept == [SHARD[0], SHARD[2], SHARD[5]]
    assert report == CurationReport(
        total=6, kept=3, dropped=3, unscored=1, harmful_flagged=1, harmful_passed=1, harmless_flagged=2
    )  # fmt: skip
    assert report.precision == pytest.approx(1 / 3)
    assert report.recall == 1 / 2


def test_replace_answers_unsafe_prompts_with_a_refusal_and_still_drops_the_unscored(safety: ServiceClient) -> None:
    kept, report = curate(SHARD, "replace", safety, None)
    assert [p.prompt for p in kept] == [p.prompt for p in SHARD if p.response != UNSCORABLE]
    assert kept[1].response == refusal_for(SHARD[1].prompt)
    assert kept[1].response in REFUSALS
    assert kept[1].harmful is None
    assert (report.kept, report.replaced, report.dropped, report.unscored) == (3, 2, 1, 1)


def test_refusals_are_fixed_by_the_prompt_and_vary_over_prompts() -> None:
    assert refusal_for("a") == refusal_for("a")
    assert len({refusal_for(str(i)) for i in range(50)}) == len(REFUSALS)


def test_revise_keeps_a_revision_only_when_it_is_sound_and_safe(safety: ServiceClient, critique: ServiceClient) -> None:
    shard = [pair(f"{BAD} a"), pair(f"{BAD} {STUBBORN}"), pair(f"{BAD} {EMPTY}"), pair("fine"), pair(UNSCORABLE)]
    kept, report = curate(shard, "revise", safety, critique)
    assert [(p.prompt, p.response) for p in kept] == [
        (shard[0].prompt, "I would rather help with something safe."),
        (shard[3].prompt, "fine"),
    ]
    assert (report.kept, report.revised, report.dropped, report.unscored) == (1, 1, 3, 1)


def test_large_shard_goes_in_batches_and_keeps_its_order(services: FakeServices, safety: ServiceClient) -> None:
    shard = [pair(f"{BAD if i % 3 == 0 else 'fine'} {i}") for i in range(70)]
    kept, report = curate(shard, "drop", safety, None)
    assert services.calls("/v1/classify") == 3
    assert kept == [p for p in shard if BAD not in p.response]
    assert report.dropped == 24


def test_shard_without_anything_unsafe_asks_the_critic_for_nothing(
    services: FakeServices, safety: ServiceClient, critique: ServiceClient
) -> None:
    curate([pair("fine")], "revise", safety, critique)
    assert services.calls("/v1/revise") == 0


@pytest.mark.parametrize(("path", "mode"), [("/v1/classify", "drop"), ("/v1/revise", "revise")])
def test_failing_service_ends_curation(
    services: FakeServices, safety: ServiceClient, critique: ServiceClient, path: str, mode: Mode
) -> None:
    services.fail_paths[path] = 500
    with pytest.raises(UpstreamUnavailable, match=r"(safety|critique): HTTP 500"):
        curate(SHARD, mode, safety, critique)


def test_unreachable_service_ends_curation_after_its_retries() -> None:
    with (
        ServiceClient("safety", closed_port(), attempts=2) as safety,
        pytest.raises(UpstreamUnavailable, match="safety"),
    ):
        curate(SHARD, "drop", safety, None)


def test_result_is_taken_from_disk_until_something_it_depends_on_changes(
    services: FakeServices, safety: ServiceClient, critique: ServiceClient, tmp_path: Path
) -> None:
    first = curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    assert (first.filter_model_id, first.filter_model_sha256) == ("fake-filter", "f" * 64)
    assert curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5) == first
    assert services.calls("/v1/classify") == 1
    curate_once(tmp_path, SHARD[:-1], "drop", safety, None, min_filter_recall=0.5)
    curate_once(tmp_path, SHARD, "replace", safety, None, min_filter_recall=0.5)
    services.threshold = 0.9
    curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    services.response_threshold = 0.9
    curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    assert services.calls("/v1/classify") == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_damaged_result_on_disk_is_made_again(services: FakeServices, safety: ServiceClient, tmp_path: Path) -> None:
    first = curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    (stored,) = tmp_path.iterdir()
    stored.write_text(stored.read_text()[:50])
    assert curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5) == first
    assert services.calls("/v1/classify") == 2


@pytest.mark.parametrize("mode", ["drop", "revise"])
def test_service_that_answers_too_few_results_ends_curation(
    services: FakeServices, safety: ServiceClient, critique: ServiceClient, mode: Mode
) -> None:
    services.answers_left_out = 1
    with pytest.raises(UpstreamUnavailable, match="safety: answered 5 results for 6 items"):
        curate(SHARD, mode, safety, critique)


def test_classifier_that_is_exchanged_meanwhile_ends_curation(
    services: FakeServices, safety: ServiceClient, tmp_path: Path
) -> None:
    services.threshold_step = 0.1
    with pytest.raises(UpstreamUnavailable, match="the classifier was changed while the shard was being curated"):
        curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_named(safety: ServiceClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file/0"):
        curate_once(tmp_path / "file" / "0", SHARD, "drop", safety, None, min_filter_recall=0.5)


def test_nothing_is_stored_when_curation_fails(services: FakeServices, safety: ServiceClient, tmp_path: Path) -> None:
    services.fail_paths["/v1/classify"] = 503
    with pytest.raises(UpstreamUnavailable):
        curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    assert list(tmp_path.iterdir()) == []


def test_reports_add_up() -> None:
    one = CurationReport(total=3, kept=2, dropped=1, harmful_flagged=1)
    assert one + CurationReport(total=2, kept=2, harmful_passed=3) == CurationReport(
        total=5, kept=4, dropped=1, harmful_flagged=1, harmful_passed=3
    )  # fmt: skip
    assert CurationReport().precision is None
    assert CurationReport().recall is None


POOR = Accuracy(unsafe=200, safe=100, recall=0.085, recall_interval=(0.054, 0.132))
GOOD = Accuracy(unsafe=200, safe=100, recall=0.905, recall_interval=(0.856, 0.938))


def calibrated(prompt: Accuracy | None, response: Accuracy | None) -> CalibrationInfo:
    return CalibrationInfo(data="own.jsonl", data_sha256="d" * 64, rows=300, prompt=prompt, response=response)


@pytest.mark.parametrize(
    ("prompt", "response", "kind"),
    [(GOOD, POOR, "responses"), (POOR, None, "prompts"), (POOR, Accuracy(unsafe=0, safe=9), "prompts")],
)
def test_filter_that_finds_too_little_is_refused_with_its_figures_and_what_to_do(
    services: FakeServices,
    safety: ServiceClient,
    tmp_path: Path,
    prompt: Accuracy | None,
    response: Accuracy | None,
    kind: str,
) -> None:
    services.calibration = calibrated(prompt, response)
    with pytest.raises(ConfigError) as caught:
        curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)
    assert caught.value.message == (
        f"the filter fake-filter finds 8.5% of unsafe {kind} (95 % interval 5.4% to 13.2%, n=200) on own.jsonl "
        "(sha256 dddddddddddd), which is below min-filter-recall=0.5: choose its thresholds on your data "
        "(`python -m services.safety calibrate`), tune it (`python -m services.safety tune`), "
        "or lower min-filter-recall"
    )
    assert services.calls("/v1/classify") == 0
    assert list(tmp_path.iterdir()) == []
    assert curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.08).report.total == len(SHARD)


def test_filter_whose_calibration_got_worse_is_refused_although_the_shard_is_already_curated(
    services: FakeServices, safety: ServiceClient, tmp_path: Path
) -> None:
    services.calibration = calibrated(None, POOR)
    curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.0)
    with pytest.raises(ConfigError, match="min-filter-recall"):
        curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5)


def test_filter_that_finds_enough_responses_curates_without_a_word(
    services: FakeServices, safety: ServiceClient, tmp_path: Path
) -> None:
    services.calibration = calibrated(POOR, GOOD)
    with capture_logs() as logs:
        curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.905)
    assert logs == []


@pytest.mark.parametrize(
    "calibration", [None, calibrated(None, None), calibrated(None, Accuracy(unsafe=0, safe=9))], ids=str
)
def test_filter_that_nobody_measured_is_warned_of_and_used(
    services: FakeServices, safety: ServiceClient, tmp_path: Path, calibration: CalibrationInfo | None
) -> None:
    services.calibration = calibration
    with capture_logs() as logs:
        assert curate_once(tmp_path, SHARD, "drop", safety, None, min_filter_recall=0.5).report.total == len(SHARD)
    assert [(log["log_level"], log["model_id"]) for log in logs] == [("warning", "fake-filter")]
    assert "NOTHING IS KNOWN OF THE FILTER'S RECALL" in logs[0]["event"]
