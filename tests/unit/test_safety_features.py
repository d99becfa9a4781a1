"""Hashed n-grams and windows: fixed values, nothing lost, and the same numbers in training and in use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.safety.embedded.features import (
    BUCKETS,
    LONGEST_WORD,
    STRIDE_WORDS,
    WINDOW_WORDS,
    bucket,
    features,
    normalise,
    windows,
    words,
)
from services.safety.embedded.ngram import HEAD_BITS, fold, load_ngram
from services.safety.training.fitting import matrix


@pytest.mark.parametrize(
    ("ngram", "kind", "expected"),
    [("bread", 1, 222459), ("bake bread", 2, 235822), (" br", 4, 77339), ("b\u00e4ckerei", 1, 121055)],
)
def test_buckets_never_change(ngram: str, kind: int, expected: int) -> None:
    assert bucket(ngram, kind) == expected


def test_normalise_folds_forms_that_look_alike() -> None:
    assert normalise("I can\u2019t \uff22\uff21\uff2b\uff25 \ufb01ve") == "i can't bake five"


def test_normalise_replaces_lone_surrogates() -> None:
    assert normalise("a\ud800b") == "a\ufffdb"
    assert normalise("\U0001f600") == "\U0001f600", "a proper pair is one character and stays"


def test_words_cut_very_long_runs_of_letters() -> None:
    assert [len(word) for word in words("x" * (2 * LONGEST_WORD + 1))] == [LONGEST_WORD, LONGEST_WORD, 1]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 96, 97, 128, 129, 1000])
def test_windows_cover_every_word_and_are_never_too_long(count: int) -> None:
    tokens = [str(number) for number in range(count)]
    found = list(windows(tokens))
    assert {token for window in found for token in window} == set(tokens)
    assert all(len(window) <= WINDOW_WORDS for window in found)


@given(st.lists(st.sampled_from("abc"), max_size=300), st.lists(st.sampled_from("xyz"), max_size=200))
def test_more_words_leave_full_windows_alone(first: list[str], more: list[str]) -> None:
    full = [window for window in windows(first) if len(window) == WINDOW_WORDS]
    assert list(windows(first + more))[: len(full)] == full


@given(st.text(max_size=400))
def test_each_block_has_length_one_and_its_own_buckets(text: str) -> None:
    tokens = words(normalise(text))[:WINDOW_WORDS]
    vector = features(tokens)
    for block in (vector.indices < BUCKETS, vector.indices >= BUCKETS):
        norm = float(np.square(vector.values[block]).sum())
        assert norm == pytest.approx(1.0 if tokens else 0.0, abs=1e-5)
    assert (np.diff(vector.indices) > 0).all(), "sorted and unique"
    assert vector.indices.size == 0 or vector.indices.max() < 2 * BUCKETS


@pytest.mark.parametrize("head", HEAD_BITS)
def test_training_matrix_gives_the_scores_that_serving_gives(head: str) -> None:
    """The matrix that scikit-learn is given, times the shipped weights, is what the model computes for itself."""
    model = load_ngram()
    vectors = [features(words(text)) for text in ("how do i bake bread", "tell me a story about two old ships", "a")]
    weights, biases = model.head(head)
    expected = matrix(vectors, HEAD_BITS[head]) @ weights.T + biases
    for row, vector in zip(expected, vectors, strict=True):
        np.testing.assert_allclose(model.logits(head, vector), row, rtol=1e-4, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, BUCKETS - 1), st.booleans(), st.sampled_from(sorted(set(HEAD_BITS.values()))))
def test_fold_keeps_the_blocks_apart(index: int, letters: bool, bits: int) -> None:
    folded = int(fold(np.array([index + BUCKETS * letters], np.int64), bits)[0])
    assert folded == index % (1 << bits) + letters * (1 << bits)


def test_stride_is_half_a_window() -> None:
    assert STRIDE_WORDS * 2 == WINDOW_WORDS, "so that a passage of half a window stands whole in one of them"
