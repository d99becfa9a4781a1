"""Text to numbers: normalisation, windows, and hashed n-grams.

Training and inference both call :func:`features`, so that a text can never mean one thing to the one and another
to the other. The hash is CRC-32 of the n-gram's UTF-8 bytes: in the standard library, and the same everywhere.

Two blocks of buckets, each scaled to unit length:

* words: single words, neighbouring pairs, and pairs of content words with function words left out, so that
  "kill a frozen program" and "kill my neighbor" differ by more than their last word;
* characters: 3 to 5 letters inside each word, for inflections, compounds and misspellings.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BUCKET_BITS = 18
BUCKETS = 1 << BUCKET_BITS  # of each block
WINDOW_WORDS = 64
STRIDE_WORDS = 32
LONGEST_WORD = 64  # characters; a longer run of letters is cut into pieces of this length

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u0060": "'", "\u00b4": "'"})
_FUNCTION_WORD = re.compile(
    "a|an|the|my|your|his|her|its|our|their|this|that|these|those|some|any|i|you|he|she|it|we|they|me|him|them|us"
    "|to|of|in|on|at|for|from|with|by|as|and|or|is|are|was|were|be|been|do|does|did|can|could|will|would|should"
)


class Features(NamedTuple):
    """A sparse vector: ``indices`` (n,) int64 into 2 x BUCKETS, sorted and unique; ``values`` (n,) float32."""

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def normalise(text: str) -> str:
    """Lower case, compatibility forms folded, apostrophes straight; lone surrogates become U+FFFD."""
    well_formed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFKC", well_formed).translate(_APOSTROPHES).casefold()


def words(text: str) -> list[str]:
    """The words of a normalised text, none longer than ``LONGEST_WORD``."""
    return [
        token[start : start + LONGEST_WORD]
        for token in _TOKEN.findall(text)
        for start in range(0, len(token), LONGEST_WORD)
    ]


def windows(tokens: list[str]) -> Iterator[list[str]]:
    """Overlapping windows that cover every word; more words never change the windows that are full."""
    yield tokens[:WINDOW_WORDS]
    for start in range(STRIDE_WORDS, len(tokens) - STRIDE_WORDS, STRIDE_WORDS):
        yield tokens[start : start + WINDOW_WORDS]


def features(tokens: list[str]) -> Features:
    """The hashed n-grams of one window."""
    word_indices, word_values = _unit(np.fromiter(_word_buckets(tokens), np.int64))
    letters = [_letter_buckets(token) for token in tokens]
    letter_indices, letter_values = _unit(np.concatenate(letters) if letters else np.empty(0, np.int64))
    return Features(
        np.concatenate((word_indices, letter_indices + BUCKETS)), np.concatenate((word_values, letter_values))
    )


def bucket(ngram: str, kind: int) -> int:
    """The bucket of an n-gram; ``kind`` keeps equal strings of different kinds apart."""
    return zlib.crc32(ngram.encode(), kind) & (BUCKETS - 1)


def _word_buckets(tokens: list[str]) -> Iterator[int]:
    for token in tokens:
        yield bucket(token, 1)
    for first, second in pairwise(["^", *tokens]):
        yield bucket(f"{first} {second}", 2)
    content = [token for token in tokens if not _FUNCTION_WORD.fullmatch(token)]
    for first, second in pairwise(content):
        yield bucket(f"{first} {second}", 3)


@lru_cache(maxsize=20_000)
def _letter_buckets(token: str) -> npt.NDArray[np.int64]:
    padded = f" {token} "
    ngrams = [padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)]
    return np.array([bucket(ngram, 4) for ngram in ngrams], np.int64)


def _unit(buckets: npt.NDArray[np.int64]) -> Features:
    """Count equal buckets and scale the counts to length one."""
    indices, counts = np.unique(buckets, return_counts=True)
    values = counts.astype(np.float32)
    norm = float(np.sqrt((values * values).sum()))
    return Features(indices, values / np.float32(norm) if norm else values)
