"""What the model is trained on: near-duplicates out, labels by rule, the generator reproducible."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from services.contracts.errors import ConfigError, DataError
from services.safety.embedded.refusal import has_refusal_phrase
from services.safety.training.answers import affirmative, own_answers
from services.safety.training.fitting import WindowTable, share_at_least, threshold_at
from services.safety.training.held_out import advbench, xstest
from services.safety.training.near_duplicates import NearDuplicates
from services.safety.training.rows import Row, is_held_out
from services.safety.training.sources import SOURCES, at_most, data_folder, read_sources
from services.safety.training.train import answer_rows, prompt_rows
from services.safety.training.wording import categorised, fill, frames, lines, own_prompts

HELD_OUT = NearDuplicates(["Write a long poem about the old red house by the sea", "Bake bread"])


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("Write a long poem about the old red house by the sea", True),
        ("write a LONG poem about the old red house, by the sea!", True),
        ("Write a long poem about the old blue house by the sea", True),
        ("Please write a short song about the old red house by the lake", False),
        ("sea the by house red old the about poem long a Write", False),
        ("bake bread.", True),
        ("Bake some bread", False),
        ("", False),
    ],
)
def test_near_duplicates(text: str, repeats: bool) -> None:
    assert HELD_OUT.repeats(text) is repeats


def test_a_common_phrase_alone_is_no_sign_of_copying() -> None:
    common = NearDuplicates([f"what is the capital of country {n}" for n in range(300)])
    assert not common.repeats("what is the capital of Mongolia")
    assert common.repeats("what is the capital of country 7")


def test_own_wording_is_the_same_every_time_and_large_enough() -> None:
    first, second = own_prompts(0), own_prompts(0)
    assert first == second
    counts = Counter(row.unsafe for row in first)
    assert counts[True] > 8_000
    assert counts[False] > 15_000
    assert len(lines("lookalikes")) >= 400


def test_neutral_frames_carry_harmful_and_harmless_acts_alike() -> None:
    rows = [row for row in own_prompts(0) if row.source == "own_acts"]
    harmful = {act for _, act in categorised("acts_harmful")}
    shares = []
    for frame in frames()["act"]:
        start = frame.split("{x}")[0]
        using = [row for row in rows if row.group and row.text == fill(frame, row.group)]
        shares.append(np.mean([row.group in harmful for row in using]))
        assert len(using) > 50, start
    assert min(shares) > 0.3, "no frame stands with harmless acts only"
    assert max(shares) < 0.8, "no frame stands with harmful acts only"


def test_own_answers_refuse_in_words_that_the_phrase_list_mostly_knows() -> None:
    answers = own_answers(0)
    refused = [answer for answer in answers if answer.refused]
    assert not any(answer.unsafe for answer in refused)
    assert np.mean([has_refusal_phrase(answer.text) for answer in refused]) > 0.7
    assert np.mean([has_refusal_phrase(answer.text) for answer in answers if not answer.refused]) < 0.01


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("How do I bake bread?", "Sure, here is how to bake bread:"),
        ("Write a poem about rain.", "Sure, here is a poem about rain:"),
        ("Explain how to tie a knot", "Sure, here is how to tie a knot:"),
        ("Bread?", None),
        ("", None),
    ],
)
def test_affirmative_openings(prompt: str, opening: str | None) -> None:
    assert affirmative(prompt) == opening


def test_rows_of_one_group_stand_on_one_side() -> None:
    rows = [Row(f"{n}", True, "s", group="same") for n in range(50)]
    assert len({is_held_out(row.key, 50) for row in rows}) == 1
    assert 50 < sum(is_held_out(Row(str(n), True, "s").key, 10) for n in range(1000)) < 150


def test_sampling_depends_on_texts_only() -> None:
    rows = [Row(str(n), True, "s") for n in range(20)]
    assert at_most(rows, 5) == at_most(rows[::-1], 5)
    assert len(at_most(rows, 50)) == 20


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"airr_official.*ailuminate"):
        read_sources(tmp_path, SOURCES)
    with pytest.raises(ConfigError, match="--data"):
        data_folder(None)


def test_malformed_data_is_named(tmp_path: Path) -> None:
    source = next(source for source in SOURCES if source.name == "dangerousqa")
    (tmp_path / "harmfulqa").mkdir()
    (tmp_path / source.files[0]).write_text("{]")
    with pytest.raises(DataError, match="dangerousqa"):
        read_sources(tmp_path, [source])


def test_no_source_is_non_commercial_or_share_alike() -> None:
    assert not [source.name for source in SOURCES if "NC" in source.licence or "SA" in source.licence]


def test_fitting_is_reproducible_and_learns() -> None:
    rows = [row for row in own_prompts(0) if row.source == "own_artifacts"][::8]
    labels = [row.unsafe for row in rows]
    first, second = (WindowTable(rows).fit("refusal", labels) for _ in range(2))
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.bias == second.bias


def test_thresholds() -> None:
    scores = [n / 100 for n in range(101)]
    assert threshold_at(scores, 0.02) == pytest.approx(0.98)
    assert share_at_least(scores, 0.98) == pytest.approx(3 / 101)


def test_training_rows_hold_no_benchmark_text(data_dir: Path) -> None:
    """On the real data: nothing of AdvBench and XSTest is left, although a source holds AdvBench lines."""
    texts = [text for pair in advbench(data_dir) for text in (pair.prompt, pair.response)]
    benchmarks = NearDuplicates([*texts, *(text for text, _ in xstest(data_dir))])
    unfiltered = read_sources(data_dir, SOURCES)
    rows = prompt_rows(data_dir, benchmarks)
    answers = answer_rows(data_dir, rows, benchmarks)
    assert any(benchmarks.repeats(row.text) for row in unfiltered), "there is something to find"
    assert not [row.source for row in rows if benchmarks.repeats(row.text)]
    assert not [answer.source for answer in answers if benchmarks.repeats(answer.text)]
