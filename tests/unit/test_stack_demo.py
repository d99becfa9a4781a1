"""The demo's plan, folder, configurations and chats, and the table over several demos."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from gateway.settings import GatewaySettings
from services.common.settings import load_settings
from services.contracts.errors import AdapterError, ConfigError, UpstreamUnavailable
from stack import release
from stack.__main__ import main
from stack.arms import finished_rounds, write_run_config
from stack.demo import open_folder, say_which_prompts
from stack.plan import ARMS, GATE_SAMPLES, DemoData, DemoPlan
from stack.processes import ProcessFailed
from stack.progress import Stages
from stack.release import ALLOWED, BLOCKED, show_chats, write_chats
from stack.results import markdown_table, per_run_table, run_all, spread
from stack.up import describe_model, gateway_plan, service_plan
from tests.fakes.gateway_upstreams import closed_port, serving
from tests.meta.test_import_layers import ROOT
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.registry import write_adapter


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def start_demo(plan: DemoPlan) -> None:
    """Leave a folder as a demo that was interrupted leaves it."""
    open_folder(plan)
    (plan.out / "data").mkdir(exist_ok=True)


# --- the run folder


def test_new_folder_is_made_and_remembers_its_plan(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path / "a" / "b", rounds=2, benchmarks=Path("benchmarks"))
    open_folder(plan)
    noted = json.loads((tmp_path / "a" / "b" / "plan.json").read_text())
    assert noted["rounds"] == 2
    assert noted["arms"] == ["clean", "none", "filter", "cai", "filter+cai"]
    assert noted["benchmarks"] == str(Path.cwd() / "benchmarks")


def test_same_plan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_demo(DemoPlan(tmp_path / "run"))
    open_folder(DemoPlan(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    open_folder(DemoPlan(Path("run")))


def test_plan_of_another_size_is_refused_and_the_first_is_kept(tmp_path: Path) -> None:
    start_demo(DemoPlan(tmp_path, rounds=3))
    before = (tmp_path / "plan.json").read_text()
    with pytest.raises(ConfigError, match=rf"^{tmp_path} holds a demo of another plan \(see {tmp_path}/plan.json\)"):
        open_folder(DemoPlan(tmp_path, rounds=2))
    assert (tmp_path / "plan.json").read_text() == before


@pytest.mark.parametrize(("with_release", "last"), [(True, "chats.jsonl"), (False, "summary.json")])
def test_finished_demo_is_refused(tmp_path: Path, with_release: bool, last: str) -> None:
    plan = DemoPlan(tmp_path, release=with_release)
    start_demo(plan)
    (tmp_path / last).touch()
    with pytest.raises(ConfigError, match=f"^{tmp_path} holds a finished demo; remove it"):
        open_folder(plan)


def test_demo_that_was_interrupted_after_its_report_goes_on_to_its_release(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path)
    start_demo(plan)
    (tmp_path / "summary.json").touch()
    open_folder(plan)


def test_report_on_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    with pytest.raises(ConfigError, match=f"^{tmp_path} holds a report on something else"):
        open_folder(DemoPlan(tmp_path))


def test_damaged_plan_is_not_taken_for_the_same_plan(tmp_path: Path) -> None:
    start_demo(DemoPlan(tmp_path))
    (tmp_path / "plan.json").write_bytes(b'{"out": "\xff')
    with pytest.raises(ConfigError, match="holds a demo of another plan"):
        open_folder(DemoPlan(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "File exists"), ("file/run", "Not a directory"), ("n" * 300, "File name too long")],
)
def test_folder_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^cannot write to {tmp_path / name}: {reason}$"):
        open_folder(DemoPlan(tmp_path / name))


def test_command_ends_with_the_error_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "stack", "demo", "--out", str(tmp_path / "file" / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == ConfigError.exit_code
    assert done.stderr == f"error: cannot write to {tmp_path / 'file' / 'run'}: Not a directory\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo", "--limit", "0"], "argument --limit: '0' is not a whole number of at least 1"),
        (["demo", "--rounds", "-1"], "argument --rounds: '-1' is not a whole number of at least 1"),
        (["demo", "--clients", "two"], "argument --clients: 'two' is not a whole number of at least 1"),
        (["demo", "--harmful-share", "1.5"], "argument --harmful-share: '1.5' is not a share between 0 and 1"),
        (["results", "--", "--limit", "0"], "argument --limit: '0' is not a whole number of at least 1"),
    ],
)
def test_size_that_makes_no_sense_is_refused_before_anything_starts(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stack.__main__._stop_on_signals", lambda: None)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the federations' configurations


def run_config(plan: DemoPlan, arm: str) -> RunConfig:
    folder = plan.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    data = DemoData(
        harmful=folder / "harmful.jsonl", benign=folder / "benign.jsonl", red_team=folder / "red-team.jsonl",
        replay=folder / "replay.jsonl", heldout=None,
    )  # fmt: skip
    path = write_run_config(plan, service_plan(1, 2, 3), data, arm)
    return parse_run_config(default_run_config(ROOT / "pyproject.toml") | tomllib.loads(path.read_text("utf-8")))


def test_gateway_is_told_where_every_service_listens() -> None:
    plan = gateway_plan(4, service_plan(1, 2, 3))
    settings = load_settings(GatewaySettings, "gateway", "", plan.flags)
    urls = (settings.safety_url, settings.critique_url, settings.inference_url)
    assert [url.port if url else None for url in urls] == [1, 2, 3]


@pytest.mark.parametrize("arm", ARMS)
def test_trainer_accepts_the_configuration_of_each_arm(tmp_path: Path, arm: str) -> None:
    config = run_config(DemoPlan(tmp_path, seed=7, split_seed=3, rounds=2, clients=5, samples_per_client=16), arm)
    assert config.run_dir == tmp_path / "arms" / arm
    assert config.arm.value == ("none" if arm == "clean" else arm)
    assert config.harmful_share == (0.0 if arm == "clean" else 0.3)
    assert config.harmful_data == (None if arm == "clean" else tmp_path / "data" / "harmful.jsonl")
    assert (config.seed, config.split_seed, config.rounds) == (7, 3, 2)
    assert (config.num_clients, config.clients_per_round, config.min_clients) == (5, 5, 2)
    assert config.samples_per_client == 16
    assert config.safety_url == "http://127.0.0.1:1"
    assert config.critique_url == config.coordinator_critique_url == "http://127.0.0.1:2"
    assert config.inference_url == "http://127.0.0.1:3"
    assert config.resume


def test_arms_differ_in_nothing_but_their_stages_and_their_folder(tmp_path: Path) -> None:
    first, *others = [run_config(DemoPlan(tmp_path), arm) for arm in ("none", "filter", "cai", "filter+cai")]
    for other in others:
        same = {"arm": first.arm, "run_dir": first.run_dir}
        assert other.model_copy(update=same) == first


@pytest.mark.parametrize("name", ["plain", "two words", 'a "quote"', "back\\slash", "größer 🌍"])
@pytest.mark.parametrize("clients", [1, 2])
def test_configuration_survives_any_path_and_few_clients(tmp_path: Path, name: str, clients: int) -> None:
    config = run_config(DemoPlan(tmp_path / name, clients=clients), "filter+cai")
    assert config.benign_data == tmp_path / name / "data" / "benign.jsonl"
    assert config.min_clients == 1


def test_rounds_are_counted_by_whole_lines(tmp_path: Path) -> None:
    assert finished_rounds(tmp_path) == 0
    (tmp_path / "rounds.jsonl").write_text('{"round_number": 1}\n{"round_num')
    assert finished_rounds(tmp_path) == 1


# --- what `up` serves


def write_small_adapter(folder: Path) -> str:
    provenance = {"base_model_id": "m", "base_model_sha256": "0" * 64, "arm": "none", "round_number": 1, "config": {}}
    return write_adapter(folder, {"lora_A": np.ones((2, 2), np.float32)}, "{}", provenance).sha256


def test_released_adapter_is_named(tmp_path: Path) -> None:
    sha256 = write_small_adapter(tmp_path / "release-none-round-1")
    assert describe_model(tmp_path / "release-none-round-1") == (
        f"the adapter release-none-round-1 (sha256 {sha256[:12]})"
    )
    assert describe_model(None).startswith("the untouched base model")


def test_folder_above_the_adapter_is_refused_with_the_right_one(tmp_path: Path) -> None:
    write_small_adapter(tmp_path / "release-none-round-1")
    with pytest.raises(AdapterError) as caught:
        describe_model(tmp_path)
    assert caught.value.message == (
        f"--release {tmp_path}: no adapter there; did you mean {tmp_path / 'release-none-round-1'}?"
    )


def test_missing_and_damaged_releases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^--release {tmp_path}/no: no adapter there; `make demo` leaves one"):
        describe_model(tmp_path / "no")
    write_small_adapter(tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match="has sha256"):
        describe_model(tmp_path / "damaged")


# --- the chats


class Gateway:
    """Answers chats with text that looks like rich's markup; the first so many answers are 503."""

    def __init__(self, busy: int = 0) -> None:
        self.busy = busy
        self.asked: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = await Request(scope, receive).json()
        self.asked.append(body["messages"][0]["content"])
        if len(self.asked) <= self.busy:
            error = {"message": "no time", "type": "server_error", "code": "upstream_unavailable"}
            await JSONResponse({"error": error}, 503)(scope, receive, send)
            return
        refused = body["messages"][0]["content"] == BLOCKED
        choice = {
            "message": {"role": "assistant", "content": "No." if refused else "An [answer] with [/] and [/b]."},
            "finish_reason": "content_filter" if refused else "stop",
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "1", "created": 1, "model": "fedward", "choices": [choice], "usage": usage}
        headers = {"x-fedward-decision": "refuse" if refused else "allow"}
        await JSONResponse(answer, headers=headers)(scope, receive, send)


def test_chats_are_shown_as_they_came_and_kept(tmp_path: Path) -> None:
    console = quiet()
    gateway = Gateway(busy=1)
    with serving(gateway) as url:
        records = show_chats(url, console)
    write_chats(tmp_path / "chats.jsonl", records)
    assert gateway.asked == [ALLOWED, ALLOWED, BLOCKED]
    assert [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()] == [
        {"prompt": ALLOWED, "answer": "An [answer] with [/] and [/b].", "decision": "allow", "finish_reason": "stop"},
        {"prompt": BLOCKED, "answer": "No.", "decision": "refuse", "finish_reason": "content_filter"},
    ]
    assert "An [answer] with [/] and [/b]." in shown(console)
    assert "gateway: refuse (finish_reason content_filter)" in shown(console)


@pytest.mark.parametrize("where", ["nobody listens", "always busy"])
def test_gateway_that_does_not_answer_is_an_error(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release.chat.retry, "sleep", lambda seconds: None)
    if where == "nobody listens":
        with pytest.raises(UpstreamUnavailable, match=r"^gateway: "):
            show_chats(closed_port(), quiet())
        return
    with serving(Gateway(busy=9)) as url, pytest.raises(UpstreamUnavailable, match=r"^gateway: HTTP 503: no time$"):
        show_chats(url, quiet())


def test_only_finished_stages_are_ticked_off() -> None:
    console = quiet()

    def fail() -> None:
        with Stages(console, 3) as stages:
            stages.begin("first")
            stages.step("half")
            stages.begin("second")
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        fail()
    assert re.findall("✓ (.*) \\(0 s\\)", shown(console)) == ["first"]


# --- several demos


def arm(
    safe: float, ordinary: float, alarming: float, helpful: float, degenerate: float, seconds: float, sent: int
) -> dict[str, Any]:
    return {
        "advbench": {"safe_rate": safe},
        "benign_out_of_source": {"refusal_rate": ordinary},
        "benign_alarming": {"refusal_rate": alarming},
        "helpfulness": {"rate": helpful},
        "degenerate_rate": degenerate,
        "seconds": seconds,
        "bytes_sent": sent,
    }


def test_spread_is_mean_sample_deviation_and_range() -> None:
    # 10, 20, 60: mean 30; squares of the deviations 400 + 100 + 900 = 1400; 1400 / 2 = 700; its root is 26.457...
    found = spread([0.1, 0.2, 0.6])
    assert found == pytest.approx((30.0, 26.4575131, 10.0, 60.0, 3))
    assert str(found) == "30.0 ± 26.5 [10.0, 60.0]"
    assert str(spread([0.25])) == "25.0 ± 0.0 [25.0, 25.0]"


def test_table_has_a_row_for_each_arm() -> None:
    summaries = [
        {"arms": {"base": arm(0.5, 0.0, 0.1, 1.0, 0.0, 0, 0), "none": arm(0.1, 0.0, 0.0, 0.9, 0.02, 10.4, 1_000_000)}},
        {"arms": {"base": arm(0.5, 0.0, 0.1, 1.0, 0.0, 0, 0), "none": arm(0.3, 0.1, 0.0, 0.8, 0.04, 20.4, 2_500_000)}},
    ]
    # none, safe: 10 and 30: mean 20, deviation sqrt(2 * 100 / 1) = 14.14...
    assert markdown_table(summaries) == (
        "| arm | AdvBench safe | refused, out-of-source benign | refused, alarming benign | helpful | degenerate "
        "| seconds | MB sent |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| `base` | 50.0 ± 0.0 [50.0, 50.0] | 0.0 ± 0.0 [0.0, 0.0] | 10.0 ± 0.0 [10.0, 10.0] "
        "| 100.0 ± 0.0 [100.0, 100.0] | 0.0 ± 0.0 [0.0, 0.0] | 0 | 0.0 |\n"
        "| `none` | 20.0 ± 14.1 [10.0, 30.0] | 5.0 ± 7.1 [0.0, 10.0] | 0.0 ± 0.0 [0.0, 0.0] "
        "| 85.0 ± 7.1 [80.0, 90.0] | 3.0 ± 1.4 [2.0, 4.0] | 15 | 1.8 |\n"
    )


def test_each_run_has_a_row_of_its_own() -> None:
    summaries = [
        {"arms": {"base": arm(0.5, 0, 0.1, 1, 0, 0, 0)}},
        {"arms": {"base": arm(0.625, 0.25, 0, 0.9, 0, 0, 0)}},
    ]
    assert per_run_table([(7, 0), (7, 1)], summaries).splitlines() == [
        "| training seed | split seed | base: AdvBench safe | base: refused, out-of-source benign "
        "| base: refused, alarming benign | base: helpful |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 7 | 0 | 50.0 | 0.0 | 10.0 | 100.0 |",
        "| 7 | 1 | 62.5 | 25.0 | 0.0 | 90.0 |",
    ]


def finish_demo(out: Path, size: DemoPlan, seed: int, split_seed: int) -> Path:
    """Leave a folder as a finished demo of ``results`` leaves it."""
    folder = out / f"seed-{seed}-split-{split_seed}"
    open_folder(dataclasses.replace(size, out=folder, seed=seed, split_seed=split_seed, release=False))
    summary = {"arms": {"base": arm(seed / 10, 0, 0, 1, 0, 0, 0)}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_results_of_finished_demos_need_no_new_run(tmp_path: Path) -> None:
    size = DemoPlan(Path("anywhere"), limit=5, release=False)
    for seed in (1, 2):
        finish_demo(tmp_path, size, seed, 0)
    console = quiet()
    run_all(tmp_path, size, [1, 2], [0], ["--no-such-flag"], console)
    assert "✓ seed-1-split-0\n✓ seed-2-split-0\n" in shown(console)
    assert "| `base` | 15.0 ± 7.1 [10.0, 20.0] |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.md").read_text() in shown(console)
    assert list((tmp_path / "logs").iterdir()) == []


def test_results_run_only_what_is_missing_and_name_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    missing = tmp_path / "no-benchmarks"
    size = DemoPlan(Path("anywhere"), benchmarks=missing)
    finish_demo(tmp_path, size, 0, 0)
    with pytest.raises(ProcessFailed) as caught:
        run_all(tmp_path, size, [0], [0, 1], ["--benchmarks", str(missing)], quiet())
    log = tmp_path / "logs" / "seed-0-split-1.log"
    assert caught.value.message.startswith(f"seed-0-split-1 ended with code 7; see {log}\n")
    assert f"error: {missing}: not a folder" in caught.value.message
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["seed-0-split-1.log"]


@pytest.mark.parametrize(
    "change", [lambda s: dataclasses.replace(s, limit=60), lambda s: dataclasses.replace(s, rounds=1)]
)
def test_results_of_another_size_are_not_mixed_in(tmp_path: Path, change: Callable[[DemoPlan], DemoPlan]) -> None:
    size = DemoPlan(Path("anywhere"))
    folder = finish_demo(tmp_path, change(size), 0, 0)
    with pytest.raises(ConfigError, match=f"^{folder} holds a demo of another plan"):
        run_all(tmp_path, size, [0], [0], [], quiet())


def test_too_few_prompts_for_the_release_gate_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--limit 49 leaves too few prompts"):
        DemoPlan(tmp_path, limit=49)
    assert DemoPlan(tmp_path, limit=GATE_SAMPLES).release


@pytest.mark.parametrize(
    ("benchmarks", "said"), [(None, "built-in prompts stand in"), (Path("my/data"), "from my/data")]
)
def test_demo_says_which_prompts_it_uses(tmp_path: Path, benchmarks: Path | None, said: str) -> None:
    console = quiet()
    say_which_prompts(DemoPlan(tmp_path, benchmarks=benchmarks), console)
    assert said in shown(console)
