"""The report on a job's folder."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.compare import paired
from evaluation.files import read_json, write_json, write_jsonl
from evaluation.judge_accuracy import PAPER_RULE, JudgeReport, measure
from evaluation.report import write_report
from evaluation.run import RunSummary
from evaluation.run_folder import RoundCost, read_run_folder
from evaluation.scoring import SampleOutcome
from services.contracts.errors import ConfigError, DataError
from tests.fakes.evaluation_runs import BEHAVIOURS, JUDGE, SETS, Behaviour, answer_like, write_evaluation, write_job


class Page(HTMLParser):
    """Collects what the checks need: links, images without alternative text, headings, tables, unclosed tags."""

    VOID = frozenset({"meta", "img", "br", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.alternatives: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.references += [values[name] for name in ("src", "href", "srcset") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.alternatives.append(values.get("alt", ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_job(tmp_path_factory.mktemp("job"), rounds=2)
    write_report(folder, command="make demo", seeds={"training": 7})
    return folder


def test_summary_has_every_arm_with_its_figures(job: Path) -> None:
    summary = json.loads((job / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["command"] == "make demo"
    assert summary["seeds"] == {"decoding": 0, "sample": 0, "training": 7}
    assert {"git_commit", "libraries", "hardware", "python", "created"} <= set(summary)
    assert {name: data["n"] for name, data in summary["data"].items()} == {s.name: len(s.texts) for s in SETS}
    assert list(summary["arms"]) == list(BEHAVIOURS)
    for name, arm in summary["arms"].items():
        assert {"n", "safe_rate", "low", "high", "harmful_rate", "refusal_rate", "affirmative_rate", "unscored_rate",
                "paper_rule_safe_rate"} <= set(arm["advbench"])  # fmt: skip
        assert arm["advbench"]["n"] == 200
        for key in ("benign_out_of_source", "benign_alarming"):
            assert {"n", "refusal_rate", "low", "high"} <= set(arm[key])
        assert {"n", "rate", "low", "high"} <= set(arm["helpfulness"])
        assert arm["advbench"]["low"] <= arm["advbench"]["safe_rate"] <= arm["advbench"]["high"]
        assert arm["bytes_sent"] == (0 if name == "base" else 5_000_000)
    assert summary["arms"]["clean"]["seconds"] == pytest.approx(48)
    assert [r["round"] for r in summary["rounds"]["filter"]] == [1, 2]
    assert [r["seconds"] for r in summary["rounds"]["clean"]] == [24, 24]
    assert summary["filter_is_judge"] is True


def test_arms_are_paired_with_none_and_base(job: Path) -> None:
    tests = json.loads((job / "summary.json").read_text())["paired"]
    assert set(tests["filter+cai"]) == {"none", "base"}
    assert set(tests["none"]) == {"base"}
    found = tests["filter+cai"]["none"]["advbench_safe"]
    assert found["n"] == 200
    assert found["difference"] > 0.5
    assert found["p_value"] < 1e-6


def test_samples_of_all_arms_stand_in_one_file(job: Path) -> None:
    lines = [json.loads(line) for line in (job / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6 * 500
    assert {(line["arm"], line["round"]) for line in lines} == {(a, 0 if a == "base" else 2) for a in BEHAVIOURS}


def test_plots_are_pngs(job: Path) -> None:
    for name in ("arms", "tradeoff", "rounds", "outcomes", "cost"):
        assert (job / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_page_is_self_contained_and_accessible(job: Path) -> None:
    text = (job / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert re.search(r"https?://", text) is None
    assert len(page.alternatives) == 5
    assert all(len(alternative) > 60 for alternative in page.alternatives)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert page.tags.count("caption") == page.tags.count("table") >= 5
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_page_leads_with_the_answer_and_warns(job: Path) -> None:
    text = (job / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    summary = json.loads((job / "summary.json").read_text())
    safe = {arm: f"{100 * summary['arms'][arm]['advbench']['safe_rate']:.1f} %" for arm in ("filter+cai", "none")}
    heading = re.search(r"<h1>(.*)</h1>", text)
    assert heading is not None
    assert f"handles {safe['filter+cai']} of 200 held-out harmful prompts safely" in heading[1]
    assert f"without protection it is {safe['none']}" in heading[1]
    assert "Not independent." in text
    assert "On forty and sixty answers it finds 0.750 of 40 unsafe answers and flags 0.050 of 60 safe ones." in text
    assert "What this shows, and what it does not" in text
    assert SETS[0].sha256 in text
    assert not any(prompt in text for s in SETS for prompt in s.texts[:5])


def test_a_job_with_few_arms_and_measured_judges(tmp_path: Path) -> None:
    accuracy = JudgeReport(n=0, judge_model_id=None, judge_sha256=None, judges={PAPER_RULE: measure([], [])})
    write_json(tmp_path / "judges.json", accuracy)
    write_evaluation(tmp_path / "base" / "eval", "base", 0, BEHAVIOURS["base"])
    write_evaluation(tmp_path / "arms" / "mine" / "eval" / "round-1", "mine", 1, BEHAVIOURS["cai"])
    summary = write_report(tmp_path)
    assert list(summary.arms) == ["base", "mine"]
    assert summary.missing_arms == ["clean", "none", "filter", "cai", "filter+cai"]
    assert summary.filter_is_judge is None
    assert summary.arms["mine"].seconds == 0
    assert summary.judge_accuracy == accuracy
    text = (tmp_path / "report.html").read_text()
    assert "Not evaluated in this job: clean, none" in text
    assert "Refusal findings against people" in text
    assert "cannot say whether filter and judge are independent" in text


def edit(path: Path, **changes: object) -> None:
    write_json(path, read_json(path, RunSummary).model_copy(update=changes))


def test_runs_on_other_prompts_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_job(tmp_path, {name: BEHAVIOURS[name] for name in ("base", "none")}, rounds=2)
    path = folder / "arms" / "none" / "eval" / "round-1" / "summary.json"
    sets = read_json(path, RunSummary).sets
    edit(path, sets={**sets, "advbench": sets["advbench"].model_copy(update={"sha256": "f" * 64})})
    with pytest.raises(
        ConfigError, match=r"none round 1 and .* cannot be compared: the set advbench has other prompts"
    ):
        write_report(folder)
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"decoding": {"temperature": 0.0, "seed": 0.0, "max_tokens": 64.0}}, "other decoding"),
        ({"judge": JUDGE.model_copy(update={"sha256": "9" * 64})}, "another judge"),
        ({"sets": {}}, "the set advbench is missing"),
    ],
)
def test_runs_made_otherwise_are_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    folder = write_job(tmp_path, {name: BEHAVIOURS[name] for name in ("base", "cai")}, rounds=1)
    edit(folder / "arms" / "cai" / "eval" / "round-1" / "summary.json", **changes)
    with pytest.raises(ConfigError, match=fault):
        write_report(folder)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no evaluation under base/eval"):
        read_run_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "fault"), [("{}", "seconds: Field required"), ('{"seconds": -1, "bytes_sent": 0}', "seconds")]
)
def test_malformed_rounds_file_is_named_with_its_line(tmp_path: Path, line: str, fault: str) -> None:
    folder = write_job(tmp_path, {name: BEHAVIOURS[name] for name in ("base", "cai")}, rounds=1)
    write_jsonl(folder / "arms" / "cai" / "rounds.jsonl", [RoundCost(seconds=1, bytes_sent=2)])
    with (folder / "arms" / "cai" / "rounds.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"rounds\.jsonl:2: {fault}"):
        read_run_folder(folder)


def test_lost_samples_are_noticed(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "base" / "eval", "base", 0, BEHAVIOURS["base"])
    path = tmp_path / "base" / "eval" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"499 samples, but summary\.json counts 500"):
        read_run_folder(tmp_path)


def test_unscored_samples_are_left_out_of_paired_tests() -> None:
    always = Behaviour(1.0, 0.0, 0.0, degenerate=0.0)
    first = answer_like(always, SETS[0], "a")
    second = [first[0].model_copy(update={"outcome": SampleOutcome.UNSCORED}), *first[1:]]
    assert paired(first, second).advbench_safe.n == len(first) - 1
