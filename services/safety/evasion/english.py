"""Does this look like English? A vocabulary and letter statistics, for undoing disguises and for nothing else.

Both come from ``data/english_words.txt``: words of this project's own wording. The vocabulary is small, so a word
outside it is no sign of anything; only a *respelling* that turns unknown words into known ones is.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

WORDS = Path(__file__).parent / "data" / "english_words.txt"
LONGEST = 24  # letters of the longest word that is looked up
STRANGE = 3.0  # surprise per letter from which on a word hardly is English
SWITCH = 4.0  # what the start or the end of a run costs, in nats

KNOWN_SHARE = 0.6  # of the letters of a text must stand in known words for it to be believed English

_ENDINGS = ("ing", "ed", "es", "s", "er", "ers", "ly", "ion", "ions", "ment")
_VOWELS = "aeiou"
_SHORTEST_STEM = 3
_UNKNOWN_LETTER = 6.0  # what a letter outside every known word costs in a segmentation, in nats


@lru_cache(maxsize=1)
def _ranks() -> dict[str, int]:
    """Word to its place in the list, 0 for the most frequent."""
    lines = WORDS.read_text(encoding="utf-8").splitlines()
    return {word: rank for rank, word in enumerate(" ".join(lines[1:]).split())}


@lru_cache(maxsize=20_000)
def known(word: str) -> bool:
    """Whether a lower-case word is in the vocabulary, as it is or with an ending left off."""
    return listed(word) or any(word.endswith(ending) and _is_stem(word[: -len(ending)], ending) for ending in _ENDINGS)


def listed(word: str) -> bool:
    """Whether a lower-case word is in the vocabulary as it is."""
    return word in _ranks()


def known_share(words: Sequence[str]) -> float:
    """The share of the words' letters that stand in known words."""
    letters = sum(len(word) for word in words)
    return sum(len(word) for word in words if known(word.casefold())) / max(1, letters)


def _is_stem(stem: str, ending: str) -> bool:
    """Whether a word's stem takes the ending; before a vowel it may drop an e or double its last letter."""
    if len(stem) < _SHORTEST_STEM:
        return False
    if listed(stem):
        return True
    doubled = len(stem) > _SHORTEST_STEM and stem[-1] == stem[-2]
    return ending[0] in _VOWELS and (listed(f"{stem}e") or (doubled and listed(stem[:-1])))


@lru_cache(maxsize=1)
def _letter_statistics() -> tuple[Counter[str], Counter[str]]:
    """How often each letter triple, and its first two letters, occur in the vocabulary; words stand between spaces."""
    padded = [f"  {word} " for word in _ranks()]
    triples = Counter(word[i : i + 3] for word in padded for i in range(len(word) - 2))
    pairs: Counter[str] = Counter()
    for triple, count in triples.items():
        pairs[triple[:2]] += count
    return triples, pairs


@lru_cache(maxsize=20_000)
def strangeness(word: str) -> float:
    """Mean surprise of a lower-case word's letters in nats: about 2.2 for English, about 4.5 for random letters."""
    triples, pairs = _letter_statistics()
    padded = f"  {word} "
    surprise = [
        math.log((pairs[padded[i : i + 2]] + 13.5) / (triples[padded[i : i + 3]] + 0.5)) for i in range(len(padded) - 2)
    ]
    return sum(surprise) / len(surprise)


def evidence(word: str, other: str) -> float:
    """How much more ``other`` looks like English than ``word``, in nats; both lower case."""
    if known(word):
        return 0.0 if known(other) else -2.0 * len(word)
    return len(word) * (strangeness(word) - strangeness(other) + known(other))


def runs(evidences: Sequence[float]) -> list[bool]:
    """The most likely runs of disguised words: for each word whether it is in one, given the evidence that it is.

    A two-state Viterbi search: a run must earn what its start and its end cost, so one odd word is not enough.
    """
    plain, disguised = 0.0, -SWITCH
    steps: list[tuple[bool, bool]] = []
    for value in evidences:
        leave, enter = disguised - SWITCH > plain, plain - SWITCH > disguised
        steps.append((leave, enter))
        plain, disguised = max(plain, disguised - SWITCH), max(disguised, plain - SWITCH) + value
    state = disguised - SWITCH > plain
    found = [False] * len(steps)
    for number in range(len(steps) - 1, -1, -1):
        found[number] = state
        leave, enter = steps[number]
        state = (not enter) if state else leave
    return found


def segment(letters: str) -> tuple[list[str], float]:
    """Cut a lower-case run of letters into the likeliest words; also gives the share of letters in known words.

    Linear in the letters: from each place only the beginnings of known words are followed.
    """
    best: list[tuple[float, int, bool]] = [(0.0, 0, True), *[(math.inf, 0, False)] * len(letters)]
    for start in range(len(letters)):
        so_far = best[start][0]
        best[start + 1] = min(best[start + 1], (so_far + _UNKNOWN_LETTER, start, False))
        for end, cost in _words_at(letters, start):
            best[end] = min(best[end], (so_far + cost, start, True))
    pieces: list[tuple[str, bool]] = []
    end = len(letters)
    while end:
        _, start, is_word = best[end]
        pieces.append((letters[start:end], is_word))
        end = start
    pieces.reverse()
    share = sum(len(piece) for piece, is_word in pieces if is_word) / max(1, len(letters))
    return _with_unknown_joined(pieces), share


def _words_at(letters: str, start: int) -> Iterator[tuple[int, float]]:
    """Where known words that start here end, and what each costs (by Zipf's law the logarithm of its rank)."""
    for end in range(start + 1, min(len(letters), start + LONGEST) + 1):
        stem = letters[start:end]
        if stem not in _beginnings():
            return
        rank = _ranks().get(stem)
        if rank is not None:
            yield end, math.log(10.0 * (rank + 10.0))
        if len(stem) >= _SHORTEST_STEM:
            for ending in _ENDINGS:
                if letters.startswith(ending, end) and _is_stem(stem, ending):
                    yield end + len(ending), math.log(10.0 * len(_ranks()))


@lru_cache(maxsize=1)
def _beginnings() -> frozenset[str]:
    return frozenset(word[:end] for word in _ranks() for end in range(1, len(word) + 1))


def _with_unknown_joined(pieces: Sequence[tuple[str, bool]]) -> list[str]:
    """The words; neighbouring letters that are in no word stand together."""
    words: list[str] = []
    for is_word, group in groupby(pieces, key=itemgetter(1)):
        found = [piece for piece, _ in group]
        words += found if is_word else ["".join(found)]
    return words
