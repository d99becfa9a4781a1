"""The command line: what it refuses, and with which exit code."""

from pathlib import Path

import pytest

from evaluation.__main__ import main
from tests.fakes.evaluation_runs import write_job

RUN = ["run", "--target", "http://127.0.0.1:1", "--model", "m", "--judge", "http://127.0.0.1:1"]


@pytest.mark.parametrize("command", [[], ["split"], ["run"], ["report"], ["judges"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "examples:\n  # halve AdvBench" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["split", "--out", "x"], 2, "--data is missing: name the folder of benchmarks, or set FEDWARD_DATA"),
        (["judges"], 2, "--data is missing"),
        (["judges", "--data", "/nowhere"], 3, "cannot read it"),
        ([*RUN, "--out", "x", "--sets", "advbnch"], 2, "unknown set 'advbnch'"),
        ([*RUN, "--out", "x", "--sets", "gone.jsonl"], 3, "gone.jsonl: cannot read it"),
        ([*RUN, "--out", "x", "--api-key-env", "NO_SUCH_KEY"], 2, "NO_SUCH_KEY is not set"),
        (["report", "/nowhere"], 2, "no evaluation under base/eval"),
    ],
)
def test_mistakes_exit_with_their_own_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert capsys.readouterr().err.startswith("error: ")
    assert message in _error(arguments, capsys)
    assert not list(tmp_path.iterdir())


def _error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--limit", "0"),
        ("--max-tokens", "many"),
        ("--max-unscored", "1.5"),
        ("--max-unscored", "nan"),
        ("--concurrency", "-1"),
    ],
)
def test_bad_values_are_refused_by_name(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*RUN, "--out", "x", option, value])
    assert stopped.value.code == 2
    assert f"argument {option}: '{value}' is not a" in capsys.readouterr().err


def test_report_prints_the_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path, rounds=1)
    assert main(["report", str(tmp_path), "--seeds", "training=3", "split=0"]) == 0
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in ("base", "clean", "none", "filter", "cai", "filter+cai"))
    assert "report.html" in printed


def test_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path, rounds=1)
    (tmp_path / "summary.json").mkdir()
    assert main(["report", str(tmp_path)]) == 1
    assert "error: cannot write" in capsys.readouterr().err
