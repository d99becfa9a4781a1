"""One evaluation over real HTTP, with targets and judges that behave and that do not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.__main__ import main
from evaluation.run import RunSummary
from tests.fakes.evaluation_servers import INFO, Fake, Reply, completion, polite_target, serve, simple_judge, verdict

ROOT = Path(__file__).parents[2]
PROMPTS = [{"prompt": f"something forbidden number {i}", "harmful": True} for i in range(12)]


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return path


def run(out: Path, heldout: Path, target: Fake, judge: Fake, *options: str) -> int:
    return main(["run", "--target", target.url, "--model", "m", "--judge", judge.url, "--out", str(out),
                 "--heldout", str(heldout), "--sets", "advbench", "benign_out_of_source", *options])  # fmt: skip


def samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def summary(out: Path) -> RunSummary:
    return RunSummary.model_validate_json((out / "summary.json").read_text())


def test_evaluates_a_target_and_writes_samples_and_summary(
    tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(polite_target) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--arm", "none", "--round", "2", "--concurrency", "8") == 0
    found = summary(tmp_path / "out")
    assert (found.arm, found.round, found.model, found.judge.model_id) == ("none", 2, "m", "fake-judge")
    assert found.sets["advbench"].rates["safe"].rate == 1.0
    assert found.sets["advbench"].rates["refusal"].count == 12
    assert found.sets["benign_out_of_source"].rates["helpful"].rate == 1.0
    assert found.unscored.count == found.degenerate.count == 0
    lines = samples(tmp_path / "out")
    assert len({line["id"] for line in lines}) == len(lines) == found.n == 12 + 70
    assert [line["prompt"] for line in lines[:12]] == [p["prompt"] for p in PROMPTS]
    assert target.received[0] == {
        "model": "m",
        "max_tokens": 32,
        "temperature": 0.0,
        "seed": 0,
        "messages": [{"role": "user", "content": target.received[0]["messages"][0]["content"]}],
    }
    assert "authorization" not in {name.lower() for headers in target.headers for name in headers}
    printed = capsys.readouterr().out
    assert "built-in benign prompts, because FEDWARD_DATA is not set" in printed
    assert "forbidden" not in printed


@pytest.mark.parametrize(("others", "expected"), [("a" * 64, "a" * 64), (None, "a" * 64), ("b" * 64, None)])
def test_summary_names_the_model_that_gave_all_answers(
    tmp_path: Path, heldout: Path, others: str | None, expected: str | None
) -> None:
    def answer(path: str, body: Any) -> Reply:
        fingerprint = "a" * 64 if "number 1" in body["messages"][0]["content"] else others
        return Reply(200, completion("I'm sorry, but no.") | {"system_fingerprint": fingerprint})

    with serve(answer) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge) == 0
    assert summary(tmp_path / "out").fingerprint == expected


def test_api_key_is_sent_when_named(tmp_path: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARGET_KEY", "s3cret")
    with serve(polite_target) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "2", "--api-key-env", "TARGET_KEY") == 0
    assert {headers.get("authorization") for headers in target.headers} == {"Bearer s3cret"}
    assert "s3cret" not in (tmp_path / "out" / "summary.json").read_text()


def test_blocks_are_told_from_refusals(tmp_path: Path, heldout: Path) -> None:
    def gateway(path: str, body: Any) -> Reply:
        prompt = body["messages"][0]["content"]
        if "number 1" in prompt:
            return Reply(200, completion("I'm sorry, this was blocked.", "content_filter"))
        if "number 2" in prompt:  # Azure's way
            return Reply(
                400, {"error": {"message": "blocked", "type": "invalid_request_error", "code": "content_filter"}}
            )
        return polite_target(path, body)

    with serve(gateway) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge) == 0
    rates = summary(tmp_path / "out").sets["advbench"].rates
    assert (rates["blocked"].count, rates["refusal"].count, rates["safe"].count) == (4, 8, 12)  # 1, 10, 11 and 2
    assert [line["refused"] for line in samples(tmp_path / "out") if line["blocked"]] == [False] * 4


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(500, {"error": "boom"}), "HTTP 500"),
        (Reply(200, b"<html>not json</html>"), "unreadable"),
        (Reply(200, {"choices": []}), "unreadable"),
        (Reply(404, {"error": {"message": "no model m", "type": "t", "code": "c"}}), "HTTP 404: no model m"),
        (Reply(200, completion("late"), seconds=3.0), "no answer within"),
    ],
)
def test_a_failing_target_is_unscored_and_never_safe(
    reply: Reply, reason: str, tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(lambda path, body: reply) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "3", "--timeout-seconds", "0.4") == 5
    error = capsys.readouterr().err
    assert "6 of 6 samples are unscored, over --max-unscored 5%" in error
    assert reason in error
    found = summary(tmp_path / "out").sets["advbench"].rates
    assert (found["safe"].count, found["unscored"].count) == (0, 3)


def test_a_target_that_stumbles_is_asked_again(tmp_path: Path, heldout: Path) -> None:
    failures: list[str] = []

    def stumbling(path: str, body: Any) -> Reply:
        prompt = body["messages"][0]["content"]
        if prompt not in failures:
            failures.append(prompt)
            return Reply(429, {"error": {"message": "queue full", "type": "t", "code": "overloaded"}})
        return polite_target(path, body)

    with serve(stumbling) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "3") == 0
    assert summary(tmp_path / "out").unscored.count == 0
    assert len(target.received) == 12


def test_no_more_prompts_are_under_way_than_allowed(tmp_path: Path, heldout: Path) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def counting(path: str, body: Any) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return polite_target(path, body)

    with serve(counting) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--concurrency", "5") == 0
    assert 1 < most <= 5


def test_one_bad_prompt_does_not_spoil_the_run(tmp_path: Path, heldout: Path) -> None:
    def picky(path: str, body: Any) -> Reply:
        if "number 3" in body["messages"][0]["content"]:
            return Reply(400, {"error": {"message": "too long", "type": "t", "code": "context_length_exceeded"}})
        return polite_target(path, body)

    with serve(picky) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge) == 0
    failed = [line for line in samples(tmp_path / "out") if line["outcome"] == "unscored"]
    assert len(failed) == 1
    assert failed[0]["error"].endswith("HTTP 400: too long")
    assert failed[0]["answer"] is None


def broken_judge(classify: Reply) -> Callable[[str, Any], Reply]:
    return lambda path, body: Reply(200, INFO) if path == "/v1/model" else classify


@pytest.mark.parametrize(
    ("classify", "reason"),
    [
        (Reply(500, {}), "HTTP 500"),
        (Reply(200, {"verdicts": []}), "answered 0 verdicts to"),
        (Reply(200, b"nonsense"), "unreadable"),
    ],
)
def test_a_judge_that_fails_leaves_samples_unscored(
    classify: Reply, reason: str, tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(polite_target) as target, serve(broken_judge(classify)) as judge:
        code = run(tmp_path / "out", heldout, target, judge, "--limit", "2", "--timeout-seconds", "0.4")
    assert code == 5
    assert reason in capsys.readouterr().err
    found = summary(tmp_path / "out")
    assert found.unscored.rate == 1.0
    assert found.sets["advbench"].rates["safe"].count == 0


def test_a_verdict_without_a_refusal_finding_is_unscored(tmp_path: Path, heldout: Path) -> None:
    def terse(path: str, body: Any) -> Reply:
        if path == "/v1/model":
            return Reply(200, INFO)
        return Reply(200, {"verdicts": [{**verdict(i["response"]), "refused": None} for i in body["items"]]})

    with serve(polite_target) as target, serve(terse) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "1", "--max-unscored", "1") == 0
    assert {line["outcome"] for line in samples(tmp_path / "out")} == {"unscored"}


def test_a_missing_judge_is_noticed_before_anything_is_asked(
    tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(polite_target) as target:
        gone = Fake(simple_judge)
        gone.url = "http://127.0.0.1:9"
        assert run(tmp_path / "out", heldout, target, gone, "--timeout-seconds", "0.3") == 5
        assert not target.received
    assert "judge http://127.0.0.1:9" in capsys.readouterr().err


def test_unscored_samples_are_asked_again_and_the_others_are_not(tmp_path: Path, heldout: Path) -> None:
    def failing(path: str, body: Any) -> Reply:
        return Reply(400, {}) if "number 5" in body["messages"][0]["content"] else polite_target(path, body)

    out = tmp_path / "out"
    with serve(failing) as target, serve(simple_judge) as judge:
        assert run(out, heldout, target, judge, "--max-unscored", "0") == 5
        assert run(out, heldout, target, judge, "--max-unscored", "0") == 5
        assert len(target.received) == 82 + 1
        target.answer = polite_target
        assert run(out, heldout, target, judge, "--max-unscored", "0") == 0
        assert len(target.received) == 82 + 2
        assert run(out, heldout, target, judge) == 0
        assert len(target.received) == 82 + 2
    assert summary(out).n == len(samples(out)) == 82


def test_a_killed_run_goes_on_to_the_same_totals(tmp_path: Path, heldout: Path) -> None:
    def slow(path: str, body: Any) -> Reply:
        return polite_target(path, body)._replace(seconds=0.05)

    with serve(slow) as target, serve(simple_judge) as judge:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert run(whole, heldout, target, judge) == 0
        arguments = [sys.executable, "-m", "evaluation", "run", "--target", target.url, "--model", "m",
                     "--judge", judge.url, "--out", str(killed), "--heldout", str(heldout), "--concurrency", "2",
                     "--sets", "advbench", "benign_out_of_source"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = killed / "samples.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not log.exists() or log.read_bytes().count(b"\n") < 6):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        written = log.read_bytes().count(b"\n")
        assert 6 <= written < 82
        assert not (killed / "summary.json").exists()
        with log.open("ab") as file:
            file.write(b'{"id": "advbench-00')  # a line that the kill cut off
        before = len(target.received)
        assert run(killed, heldout, target, judge) == 0
        assert len(target.received) - before == 82 - written
    assert samples(killed) == samples(whole)
    assert summary(killed).sets == summary(whole).sets


def test_another_evaluations_folder_is_refused(
    tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(polite_target) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "1") == 0
        before = (tmp_path / "out" / "samples.jsonl").read_bytes()
        assert run(tmp_path / "out", heldout, target, judge, "--limit", "2") == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


def test_unwritable_output_is_named(tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with serve(polite_target) as target, serve(simple_judge) as judge:
        assert run(tmp_path / "taken" / "out", heldout, target, judge) == 1
        assert not target.received
    assert "error: cannot write" in capsys.readouterr().err
