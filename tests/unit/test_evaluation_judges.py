"""The judges' own accuracy."""

import asyncio
from pathlib import Path

import pytest

from evaluation.judge_accuracy import PAPER_RULE, SAFETY_SERVICE, LabelledAnswer, measure, measure_judges, read_labelled
from services.contracts.errors import UpstreamUnavailable
from tests.fakes.evaluation_servers import INFO, Reply, serve, simple_judge

LABELLED = [
    LabelledAnswer("gpt4", "p", "a", unsafe_prompt=True, refused=True),
    LabelledAnswer("gpt4", "p", "a", unsafe_prompt=True, refused=True),
    LabelledAnswer("gpt4", "p", "a", unsafe_prompt=True, refused=False),
    LabelledAnswer("llama2new", "p", "a", unsafe_prompt=False, refused=False),
    LabelledAnswer("llama2new", "p", "a", unsafe_prompt=False, refused=False),
    LabelledAnswer("llama2new", "p", "a", unsafe_prompt=False, refused=True),
]


def test_measure_keeps_its_denominators_apart() -> None:
    found = measure(LABELLED, [True, False, True, False, True, None])
    assert found.unscored == 1
    assert (found.agreement.count, found.agreement.n) == (2, 5)
    assert (found.refusals_found.count, found.refusals_found.n) == (1, 2)
    assert (found.compliance_called_refusal.count, found.compliance_called_refusal.n) == (1, 1)
    assert (found.false_refusals.count, found.false_refusals.n) == (1, 2)
    assert (found.agreement_by_model["gpt4"].count, found.agreement_by_model["gpt4"].n) == (1, 3)
    assert found.agreement_by_model["mistralguard"].n == 0


def test_paper_rule_has_its_published_errors(data_dir: Path) -> None:
    report = asyncio.run(measure_judges(data_dir, None))
    found = report.judges[PAPER_RULE]
    assert report.n == 2250
    assert list(report.judges) == [PAPER_RULE]
    assert (found.compliance_called_refusal.count, found.compliance_called_refusal.n) == (24, 136)
    assert (found.refusals_found.count, found.refusals_found.n) == (864 - 161, 864)
    assert found.agreement.rate == pytest.approx(0.829, abs=0.0005)


def test_safety_service_is_measured_over_http(data_dir: Path) -> None:
    with serve(simple_judge) as judge:
        report = asyncio.run(measure_judges(data_dir, judge.url))
    found = report.judges[SAFETY_SERVICE]
    assert (found.agreement.n, found.unscored) == (2250, 0)
    assert report.judge_model_id == "fake-judge"
    # The fake judge calls a refusal what begins with "I'm sorry".
    begins = [(a.unsafe_prompt, a.refused) for a in read_labelled(data_dir) if a.answer.startswith("I'm sorry")]
    assert found.refusals_found.count == begins.count((True, True)) > 0
    assert found.compliance_called_refusal.count == begins.count((True, False))
    assert found.false_refusals.count == begins.count((False, False))


def test_a_judge_that_breaks_down_is_an_error(data_dir: Path) -> None:
    def broken(path: str, body: object) -> Reply:
        return Reply(200, INFO) if path == "/v1/model" else Reply(400, {"error": "no"})

    with serve(broken) as judge, pytest.raises(UpstreamUnavailable, match="2250 of 2250 answers are unscored"):
        asyncio.run(measure_judges(data_dir, judge.url))
