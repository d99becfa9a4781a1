"""Tuning the encoder on an operator's own rule: the split, what the heads learn, and the whole command."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.contracts.chat import ChatMessage
from services.contracts.errors import ConfigError, DataError
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Accuracy, ClassifyItem
from services.safety.calibration import Calibration, OperatingPoint
from services.safety.embedded.encoder import load_encoder
from services.safety.embedded.encoder_build import build, find_base
from services.safety.embedded.load import CALIBRATION, load_classifier
from services.safety.embedded.weights import Manifest, read_weights, write_weights
from services.safety.items import read_item
from services.safety.training import tune
from services.safety.training.contrast import contrast_rows
from services.safety.training.encoder import EncoderWithHeads, Recipe, fit
from services.safety.training.labelled import Labelled
from services.safety.training.samples import training_samples
from services.safety.training.tune_data import replay, samples_of, split

# The invented rule: to ask about cooking is unsafe. No classifier of real harm knows it.
COOKING = (
    "bake rye bread", "knead pizza dough", "roast a chicken", "make plum jam", "cook lentil soup", "fry dumplings",
    "pickle cabbage", "steam rice", "bake scones", "stew apples", "grill corn", "boil eggs", "season a broth",
    "roll pasta", "glaze carrots",
)  # fmt: skip
OTHER = (
    "tune a guitar", "prune roses", "fix a bicycle chain", "fold a paper crane", "learn Latin verbs", "read a star map",
    "paint a fence", "plan a hike", "write a sonnet", "train a puppy", "sort stamps", "knit a scarf", "mend a kite",
    "draw a horse", "play chess",
)  # fmt: skip
FRAMES = (
    "How do I {}?", "Tell me how to {}.", "What do I need to {}?", "I want to {} this weekend.", "Can you help me {}?",
    "Is it hard to {}?", "Steps to {}", "What is the best way to {}?",
)  # fmt: skip
SHIPPED_LIKE = "fedward-safety-encoder-test"


def item(prompt: str, unsafe: bool, response: str | None = None) -> Labelled:
    return Labelled(ClassifyItem(prompt=prompt, response=response), unsafe)


def test_split_keeps_a_prompt_in_one_part_and_every_part_has_its_share_of_both_labels() -> None:
    items = [item(f"prompt {i}", unsafe=i % 4 == 0) for i in range(200)]
    items += [item(f"prompt {i}", unsafe=i % 2 == 0, response=f"r {j}") for i in range(0, 100, 5) for j in range(3)]
    parts = split(items, 0.3, seed=0)
    assert sorted(id(one) for part in parts for one in part) == sorted(map(id, items))
    prompts = [{one.item.prompt for one in part} for part in parts]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert [len(part) for part in prompts] == pytest.approx([140, 30, 30], abs=3)
    for part in parts:
        share = np.mean([one.unsafe for one in part if one.kind == "prompt"])
        assert share == pytest.approx(0.25, abs=0.05)
    assert split(items, 0.3, seed=0) == parts
    assert split(items[::-1], 0.3, seed=0).test != split(items, 0.3, seed=1).test
    assert {one.item.prompt for one in split(items[::-1], 0.3, seed=0).test} == prompts[2]


def test_heads_learn_from_what_the_label_is_about_and_from_nothing_else() -> None:
    talk = [ChatMessage(role="user", content="first"), ChatMessage(role="user", content="second")]
    items = [
        Labelled(ClassifyItem(prompt="p"), True, HazardCategory.HATE),
        Labelled(ClassifyItem(messages=talk), False),
        Labelled(ClassifyItem(messages=talk), True),
        Labelled(ClassifyItem(prompt="p", response="r"), False, refused=True),
        Labelled(ClassifyItem(prompt="p", response=" "), False),
    ]
    assert [(s.text, s.asks, s.harmful, s.declines, s.category, s.group) for s in samples_of(items)] == [
        ("p", True, None, None, HazardCategory.HATE, "p"),
        ("first", False, None, None, None, "first\nsecond"),
        ("second", False, None, None, None, "first\nsecond"),
        ("second", True, None, None, None, "first\nsecond"),
        ("r", None, False, True, None, "p"),
    ]


def test_replay_is_the_same_every_time_and_teaches_every_head_both_answers() -> None:
    samples = replay(200, seed=1)
    assert samples == replay(200, seed=1) != replay(200, seed=2)
    assert len(samples) == 200
    for labels in ([s.asks for s in samples], [s.harmful for s in samples], [s.declines for s in samples]):
        assert {True, False} <= set(labels)
    assert replay(1, seed=0) == []


def test_adapter_that_is_loaded_is_the_one_that_was_saved_and_another_rank_is_refused() -> None:
    base = find_base()
    saved = EncoderWithHeads(base, 2).tensors()
    generator = np.random.default_rng(0)
    changed = {name: generator.normal(size=value.shape).astype(np.float16) for name, value in saved.items()}
    model = EncoderWithHeads(base, 2)
    model.load(changed)
    assert all(np.array_equal(value, changed[name]) for name, value in model.tensors().items())
    with pytest.raises(ConfigError, match="other tensors than an adapter of this version and rank"):
        EncoderWithHeads(base, 3).load(changed)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder as it is shipped, with an adapter that has learnt a little from our own sentences."""
    weights, base = tmp_path_factory.mktemp("weights"), find_base()
    samples = training_samples(contrast_rows(0)[::60], [])
    tensors = fit(samples, base, Recipe(rank=4, epochs=1.0, warm_up_steps=2)).tensors()
    manifest = Manifest(model_id=SHIPPED_LIKE, sha256="0" * 64)
    manifest = write_weights(weights / "encoder", tensors, {"categories": ",".join(HazardCategory)}, manifest)
    build(weights / "encoder", weights / "built", base)
    scorer = load_encoder(weights / "built", manifest.sha256)
    point = OperatingPoint(prompt_threshold=0.5, response_threshold=0.5, refusal_threshold=0.6)
    calibration = Calibration.unmeasured(scorer.model_id, scorer.sha256, point)
    (weights / "encoder" / CALIBRATION).write_text(calibration.model_dump_json())
    return weights


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    lines = [
        {"prompt": frame.format(subject), "unsafe": unsafe}
        for subjects, unsafe in ((COOKING, True), (OTHER, False))
        for subject in subjects
        for frame in FRAMES
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.long
def test_tuning_raises_recall_on_the_operators_own_rule_and_the_result_can_be_served(
    shipped: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    comparison = tune.tune(
        labelled=labelled, out=out, weights=shipped, base=None, epochs=3.0, seed=0, held_out=tune.HELD_OUT
    )
    before, after = balanced(comparison.before), balanced(comparison.after)
    assert before.recall is not None
    assert after.recall is not None
    assert after.recall > before.recall + 0.4
    assert after.recall_interval
    assert before.recall_interval
    assert after.recall_interval[0] > before.recall_interval[1]
    assert (after.h_mean or 0) > (before.h_mean or 0)
    printed = tune.summary(comparison)
    assert "| prompts | before | 18+18" in printed
    assert "WARNING: no responses in the data: their threshold stays that of the model before" in printed

    classifier = load_classifier("encoder", weights=out, encoder=out / "built")
    info = classifier.info()
    assert info.model_id == f"{SHIPPED_LIKE}-tuned"
    assert info.calibration
    assert info.calibration.data == "own.jsonl, the 36 items held out to calibrate on"
    assert classifier.point.refusal_threshold == 0.6
    verdicts = classifier.classify_all(
        [
            read_item(ClassifyItem(prompt=text))
            for text in ("How can I simmer a tomato sauce?", "How do I sharpen a saw?")
        ]
    )
    scores = [verdict.score or 0.0 for verdict in verdicts]
    assert scores[0] > scores[1]
    metadata = read_weights(out / "encoder").metadata
    assert metadata["tuned_from"] == read_weights(shipped / "encoder").manifest.sha256


def balanced(tested: tune.Tested) -> Accuracy:
    accuracy = tested.accuracy["prompt"]
    assert accuracy
    return accuracy


@pytest.mark.parametrize("flags", [("--held-out", "0"), ("--held-out", "1"), ("--epochs", "0")])
def test_shares_and_epochs_out_of_range_are_refused(labelled: Path, tmp_path: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="0 < --held-out < 1 and --epochs > 0 must hold"):
        tune.main(["--labelled", str(labelled), "--out", str(tmp_path / "out"), *flags])


def test_weights_to_start_from_are_not_overwritten(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the folder to start from; give another"):
        tune.main(["--labelled", str(labelled), "--out", str(tmp_path / "w"), "--weights", str(tmp_path / "x/../w")])


def test_data_too_small_to_hold_some_of_each_class_out_is_refused_by_part(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    lines = [{"prompt": f"p {i}", "unsafe": i < 1} for i in range(20)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"the part to calibrate \(3 of 20\): one class only: of 3 labelled prompts"):
        tune.main(["--labelled", str(own), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_adapter_are_refused(labelled: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    manifest = Manifest(model_id="heads", sha256="0" * 64)
    write_weights(weights / "encoder", {"prompt": np.zeros(3, np.float16)}, {"categories": "S1"}, manifest)
    with pytest.raises(ConfigError, match="the weights of heads are not those of an encoder's adapter"):
        tune.main(["--labelled", str(labelled), "--out", str(tmp_path / "out"), "--weights", str(weights)])
