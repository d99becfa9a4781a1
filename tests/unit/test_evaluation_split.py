"""The split by near-duplicate cluster."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.benchmarks import ADVBENCH
from evaluation.split import (
    LINKED,
    find_clusters,
    jaccard,
    measure_leakage,
    split_at_random,
    split_by_cluster,
    write_split,
)
from evaluation.text_rules import content_words
from services.contracts.errors import DataError

# Few words, so that near-duplicates and chains of them are common.
SENTENCES = st.lists(
    st.lists(st.sampled_from(["apple", "bread", "cloud", "drum", "eagle", "flute", "grape", "of"]), max_size=5).map(
        " ".join
    ),
    max_size=25,
)


@given(SENTENCES, st.integers(0, 2**32))
@settings(max_examples=60)
def test_halves_partition_the_rows_and_share_no_near_duplicate(texts: list[str], seed: int) -> None:
    halves = split_by_cluster(texts, seed)
    assert sorted([*halves.train, *halves.heldout]) == list(range(len(texts)))
    words = [content_words(text) for text in texts]
    assert all(jaccard(words[t], words[h]) < LINKED for t in halves.train for h in halves.heldout)
    assert split_by_cluster(texts, seed) == halves


@given(SENTENCES, st.integers(0, 100))
@settings(max_examples=40)
def test_halves_differ_by_no_more_than_the_largest_cluster(texts: list[str], seed: int) -> None:
    halves = split_by_cluster(texts, seed)
    largest = max((len(cluster) for cluster in find_clusters(texts)), default=0)
    assert abs(len(halves.train) - len(halves.heldout)) <= largest
    assert len(halves.train) >= len(halves.heldout) or largest > 0


def test_clusters_reach_over_chains() -> None:
    # apple-bread-cloud and cloud-drum-eagle share one word in five, but both are linked to the one between.
    texts = ["apple bread cloud", "bread cloud drum", "cloud drum eagle", "flute"]
    assert jaccard(content_words(texts[0]), content_words(texts[2])) < LINKED
    assert find_clusters(texts) == [[0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a", "b"}, {"b", "c"}, 1 / 3),
        ({"a"}, {"a"}, 1.0),
        ({"a"}, {"b"}, 0.0),
        (set(), set(), 1.0),
        (set(), {"a"}, 0.0),
    ],
)
def test_jaccard(first: set[str], second: set[str], expected: float) -> None:
    assert jaccard(frozenset(first), frozenset(second)) == pytest.approx(expected)


def test_leakage_measures_the_nearest_training_prompt() -> None:
    texts = ["apple bread cloud", "apple bread cloud drum", "eagle flute", "grape"]
    halves = split_at_random(texts, 0)._replace(train=[0, 2], heldout=[1, 3])
    found = measure_leakage(texts, halves)
    assert (found.linked, found.near_duplicate) == (0.5, 0.5)
    assert found.nearest_median == pytest.approx(0.375)  # of 0.75 and 0


def test_another_version_of_advbench_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ADVBENCH.path
    path.parent.mkdir()
    path.write_text("goal,target\nask,Sure\n")
    with pytest.raises(DataError, match=ADVBENCH.sha256):
        write_split(tmp_path, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_advbench_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"harmful_behaviors\.csv"):
        write_split(tmp_path, 0, tmp_path)


def test_advbench_splits_without_leaking(data_dir: Path, tmp_path: Path) -> None:
    summary = write_split(data_dir, 0, tmp_path)
    assert summary.train + summary.heldout == 520
    assert summary.heldout >= 200
    assert summary.clusters == 286
    assert (summary.leakage.linked, summary.leakage.near_duplicate) == (0.0, 0.0)
    assert summary.leakage_of_a_random_split.near_duplicate > 0.2
    train = [json.loads(line) for line in (tmp_path / "advbench-train.jsonl").read_text().splitlines()]
    heldout = [json.loads(line) for line in (tmp_path / "advbench-heldout.jsonl").read_text().splitlines()]
    assert len(train) == summary.train
    assert all(set(line) == {"prompt", "response", "harmful"} and line["harmful"] for line in train)
    assert all(set(line) == {"prompt", "harmful"} for line in heldout)
    assert not {line["prompt"] for line in train} & {line["prompt"] for line in heldout}
    again = write_split(data_dir, 0, tmp_path / "again")
    assert again.files == summary.files
    assert write_split(data_dir, 1, tmp_path / "other").files != summary.files
