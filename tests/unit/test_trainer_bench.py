"""The trainer's benchmark measures what it says: real visits, every way the same number of steps."""

import json
from pathlib import Path

import pytest
import torch

from trainer.bench import __main__ as bench
from trainer.bench import start, steps, visits
from trainer.bench.stopwatch import BACKWARD, FORWARD, OPTIMIZER, Stopwatch
from trainer.bench.visits import Shape
from trainer.model import load_trainee, read_adapter_arrays, set_adapter_arrays

TINY = Shape("tiny", 2, 24, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})


def test_outermost_part_counts_and_nothing_stays_patched() -> None:
    model, loss = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    forward, backward = model.forward, torch.Tensor.backward
    watch = Stopwatch()
    with watch.watching(model):
        optimizer = torch.optim.AdamW(model.parameters())
        loss(model(torch.ones(1, 2))).sum().backward()
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())  # the forward pass within it is the optimiser's
    assert set(watch.seconds) == {FORWARD, BACKWARD, OPTIMIZER}
    assert watch.steps == 1
    assert model.forward == forward
    assert torch.Tensor.backward is backward


def test_every_way_trains_the_adapter_on_batches_of_the_same_shape(tmp_path: Path) -> None:
    config = visits.prepare(TINY, tmp_path)
    trainee = load_trainee(config)
    shapes: dict[str, set[tuple[int, ...]]] = {way: set() for way in steps.WAYS}
    for way, seen in shapes.items():
        with trainee.model.get_base_model().register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ):
            set_adapter_arrays(trainee, trainee.starting_adapter)
            figures = steps.visit(way, trainee, config, 0)
        trained = read_adapter_arrays(trainee)
        assert any((trained[name] != trainee.starting_adapter[name]).any() for name in trained)
        assert 0 < figures["outside_and_not_optimizer_share"] < figures["outside_share"] < 1
        assert not trainee.model.is_activation_checkpointing
    assert list(shapes.values()) == [{(TINY.batch, TINY.tokens)}] * 3


def test_phases_of_a_client_process_add_up(tmp_path: Path) -> None:
    config = visits.prepare(TINY, tmp_path)
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    query, ours = (start.run_apart(way, tmp_path) for way in ("query", "ours"))
    trains = {"torch, transformers, peft", "model", "training", "rest of the visit"}
    assert ours.keys() - query.keys() == trains
    for found in (query, ours):
        assert min(found.values()) > 0
        assert found["all"] == pytest.approx(sum(v for k, v in found.items() if k not in ("all", start.WALL)))


def test_figures_are_written_with_their_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SHAPES", (TINY,))
    out = tmp_path / "trainer.json"
    assert bench.main(["--parts", "steps", "--rounds", "1", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [row["way"] for row in figures["steps"]] == list(steps.WAYS)
    assert {"command", "hardware", "seeds", "versions", "git_commit"} <= figures.keys()
