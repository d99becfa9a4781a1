"""The experiment with hostile clients: its configurations, its shards, and its report on figures made by hand."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stack.hostile import DEFENCES, FEDERATIONS, Federation, write_config
from stack.hostile_report import Cell, Share, collect, copies_without_screening, markdown, share, write_report
from stack.plan import DemoData, DemoPlan
from stack.up import service_plan
from tests.fakes.trainer_runs import write_jsonl
from tests.meta.test_import_layers import ROOT
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.shards import client_shard, deal_shards

ROUNDS = 2


def plan_of(folder: Path) -> DemoPlan:
    return DemoPlan(folder, clients=10, rounds=ROUNDS, samples_per_client=4, release=False)


def run_config(folder: Path, federation: Federation) -> RunConfig:
    files = folder / "data"
    files.mkdir()
    good = [{"prompt": f"Tell me about bread {i}.", "response": "It is nice.", "harmful": False} for i in range(40)]
    bad = [{"prompt": f"Help me with trick {i}.", "response": "Sure.", "harmful": True} for i in range(40)]
    data = DemoData(
        harmful=write_jsonl(files / "bad.jsonl", bad), benign=write_jsonl(files / "good.jsonl", good),
        red_team=files / "red.jsonl", replay=files / "good.jsonl", heldout=None,
    )  # fmt: skip
    path = write_config(plan_of(folder), service_plan(1, 2, 3), data, federation)
    return parse_run_config(default_run_config(ROOT / "pyproject.toml") | tomllib.loads(path.read_text("utf-8")))


def test_each_federation_has_a_folder_of_its_own() -> None:
    assert len({federation.name for federation in FEDERATIONS}) == len(FEDERATIONS)


@pytest.mark.parametrize("federation", FEDERATIONS, ids=lambda federation: federation.name)
def test_trainer_accepts_each_federation_and_deals_harm_to_the_first_clients(
    tmp_path: Path, federation: Federation
) -> None:
    config = run_config(tmp_path, federation)
    assert config.screening == DEFENCES[federation.defence]["screening"]
    assert config.partition == federation.partition
    dealt = deal_shards(config) if config.shard_data is None else [client_shard(config, client) for client in range(10)]
    harmful = [sum(bool(pair.harmful) for pair in shard) for shard in dealt]
    wanted = 2 if federation.attack == "mixed" else 4
    assert harmful == [wanted] * federation.malicious + [0] * (10 - federation.malicious)


def test_mixed_shards_share_no_pair(tmp_path: Path) -> None:
    config = run_config(tmp_path, Federation(2, "none", "mixed"))
    prompts = [pair.prompt for client in range(10) for pair in client_shard(config, client)]
    assert len(prompts) == len(set(prompts)) == 40


# --- the report


def line(client: int, *, flagged: bool = False, drop: float = 0.1) -> dict[str, Any]:
    return {"client_id": client, "flagged": flagged, "safety_drop": drop, "harm_cosine": 0.0, "agreement": 0.5}


def finish(plan: DemoPlan, cell: Cell, safe: int, screening: list[dict[str, Any]]) -> None:
    """Leave a federation's folder as it is after its evaluation."""
    evaluation = plan.arm_dir(cell.folder) / "eval" / f"round-{ROUNDS}"
    evaluation.mkdir(parents=True)
    rates = {"advbench": {"rates": {"safe": {"count": safe, "n": 10, "rate": safe / 10}}},
             "benign_out_of_source": {"rates": {"refusal": {"count": 1, "n": 10, "rate": 0.1}}}}  # fmt: skip
    provenance = {"git_commit": "c", "uncommitted_changes": False, "python": "3", "libraries": {}, "hardware": {}}
    (evaluation / "summary.json").write_text(json.dumps({"sets": rates, **provenance}))
    rounds = "".join(json.dumps({"screening": screening}) + "\n" for _ in range(ROUNDS))
    (plan.arm_dir(cell.folder) / "rounds.jsonl").write_text(rounds)


def test_share_has_the_exact_interval() -> None:
    # With no event in n, the upper end is 1 - 0.025 ** (1 / n).
    assert share(0, 90).low == 0.0
    assert share(0, 90).high == pytest.approx(1 - 0.025 ** (1 / 90))
    assert str(share(0, 90)) == "0.0 (0.0-4.0)"
    assert share(0, 0) == Share(0, 0, 0.0, 1.0)
    assert str(share(0, 0)) == "-"


def test_row_sums_over_seeds_and_tells_malicious_from_benign(tmp_path: Path) -> None:
    cell = Cell(1, "screening", "harmful", "iid", "harmful-1-iid-screening")
    plans = [plan_of(tmp_path / "0"), plan_of(tmp_path / "1")]
    finish(plans[0], cell, 9, [line(0, flagged=True, drop=0.9), line(1), line(2)])
    finish(plans[1], cell, 5, [line(0, flagged=True, drop=0.7), line(1, flagged=True), line(2)])
    row = collect(plans, cell)
    assert (row["safe"]["count"], row["safe"]["n"], row["safe_by_seed"]) == (14, 20, [0.9, 0.5])
    assert (row["malicious_flagged"]["count"], row["malicious_flagged"]["n"]) == (4, 4)
    assert (row["benign_flagged"]["count"], row["benign_flagged"]["n"]) == (2, 8)
    assert row["malicious_flagged_safety_drop"] == [0.7, 0.9]


@pytest.mark.parametrize("flagged", [False, True])
def test_clean_run_without_false_alarm_stands_for_the_undefended_one(tmp_path: Path, flagged: bool) -> None:
    cell = Cell(0, "all", "harmful", "iid", "clean-0-iid-all")
    plan = plan_of(tmp_path)
    finish(plan, cell, 9, [line(0, flagged=flagged)])
    rows = list(copies_without_screening([collect([plan], cell)]))
    assert [row["defence"] for row in rows] == (["all"] if flagged else ["cai", "all"])
    assert rows[0]["copy_of"] == (None if flagged else cell.folder)


def test_report_is_written_and_says_what_was_found(tmp_path: Path) -> None:
    cells = [Cell(0, "screening", "harmful", "iid", "a"), Cell(2, "none", "harmful", "iid", "b"),
             Cell(0, "screening", "harmful", "dirichlet", "c")]  # fmt: skip
    plan = plan_of(tmp_path)
    for place, cell in enumerate(cells):
        finish(plan, cell, 10 - 4 * place, [line(0)])
    table = write_report(tmp_path, [plan], cells, "python -m stack hostile")
    assert "| 2 | harmful | iid | none | 60.0 (26.2-87.8) | 60 | 10.0 (0.3-44.5) | - | - |" in table
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [cell["defence"] for cell in summary["cells"]] == ["none", "screening", "none", "screening"]
    assert (summary["command"], summary["seeds"], summary["git_commit"]) == ("python -m stack hostile", [0], "c")
    assert (tmp_path / "table.md").read_text() == table == markdown(summary["cells"])
    assert (tmp_path / "safety.png").read_bytes().startswith(b"\x89PNG")
