"""The speed comparison as users start it, with few texts."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.safety.embedded.encoder import load_tokenizer
from services.safety.embedded.encoder_build import find_base
from services.safety.training.bench import make_texts
from services.safety.training.bench_report import METRICS, PAIRS, PIPELINE, SERVICE, Measurement, ratios

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "services.safety", "bench"]


def bench(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.long
def test_bench_measures_every_way_and_leaves_no_service_behind(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "safety.json"
    mine = str(tmp_path / "unused")  # a flag that tells this test's service from any other on the machine
    flags = ["--rounds", "2", "--texts", "3", "--tokens", "16", "40", "--out", str(out)]
    done = bench(*flags, "--", "--tier", "ngram", "--encoder", mine)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    cells = {(one["round"], one["tokens"], one["way"]) for one in found["measurements"]}
    assert cells == {(n, tokens, way.name) for n in (0, 1) for tokens in (16, 40) for way in SERVICE + PIPELINE}
    assert all(one[name] > 0 for one in found["measurements"] for name in METRICS)
    assert len(found["ratios"]) == 2 * len(PAIRS)
    assert found["model"]["tier"] == "n-gram"
    assert "tier n-gram" in done.stdout
    assert (found["schema_version"], found["seeds"]) == (1, {"texts": 0, "head": 0})
    assert found["command"].endswith(f"-- --tier ngram --encoder {mine}")
    assert 0 < found["service"]["ready_seconds"] < 120
    assert not [process for process in psutil.process_iter(["cmdline"]) if mine in (process.info["cmdline"] or [])]


@pytest.mark.long
def test_terminated_bench_ends_its_service(tmp_path: Path) -> None:
    mine, out = str(tmp_path / "unused"), tmp_path / "safety.json"
    flags = ["--texts", "64", "--tokens", "256", "--out", str(out), "--", "--tier", "ngram", "--encoder", mine]
    with subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"fedward-safety-ngram"), "the service runs"
        services = [one for one in psutil.Process(process.pid).children() if mine in one.cmdline()]
        assert len(services) == 1
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert not services[0].is_running()


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--texts", "-1"], ["--tokens", "16", "0"]])
def test_sizes_below_one_are_refused(flags: list[str]) -> None:
    done = bench(*flags)
    assert done.returncode == 2
    assert "above 0" in done.stderr


@pytest.mark.long
def test_service_that_does_not_start_is_an_error_that_names_its_output(tmp_path: Path) -> None:
    out = tmp_path / "safety.json"
    done = bench("--texts", "1", "--tokens", "16", "--out", str(out), "--", "--weights", "nowhere")
    assert done.returncode == 2
    assert str(out.with_suffix(".log")) in done.stderr
    assert "nowhere" in out.with_suffix(".log").read_text()
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_texts_are_the_same_every_time_and_about_as_long_as_asked(tokens: int) -> None:
    base = find_base()
    texts = make_texts(base, tokens, 20)
    assert texts == make_texts(base, tokens, 20)
    assert len(set(texts)) == 20
    tokenizer = load_tokenizer(base)
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert all(abs(length - tokens) <= 2 for length in lengths)


def test_ratio_is_the_median_over_rounds_of_neighbours() -> None:
    """Each round's service is compared with the same round's pipeline: a machine that slows down changes nothing."""
    slowdown = (1.0, 2.0, 4.0)
    measured = [
        Measurement(number, 16, way.name, speed / slower, 10.0 * slower, 2.0 * slower, 3.0 * slower)
        for number, slower in enumerate(slowdown)
        for way, speed in [(way, 30.0) for way in SERVICE] + [(way, 10.0 + number) for way in PIPELINE]
    ]
    found = ratios(measured)
    assert found[0]["service"] == "service, 1 request"
    assert found[0]["texts_per_second"] == pytest.approx({"median": 30 / 11, "low": 2.5, "high": 3.0})
    assert found[0]["cpu_ms_per_text"] == found[0]["p95_ms"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "p50_ms" not in found[-1], "64 items and 16 texts a call have no latency in common"
