"""Finding training texts that nearly repeat a text of an evaluation set.

Public sets borrow from each other (a "different" set may hold all of AdvBench), so a model is only measured
honestly when such rows are dropped first.
"""

from collections import defaultdict
from collections.abc import Iterable

from services.safety.embedded.features import normalise, words

NGRAM = 4
MIN_JACCARD = 0.7
COMMON = 200  # an n-gram in more held-out texts than this is a phrase of the language, not a sign of copying


class NearDuplicates:
    """An index of held-out texts.

    A text nearly repeats a held-out one when the words are the same, or when the two share a run of four words
    and at least 70 % of all their words (Jaccard index of the word sets).
    """

    def __init__(self, held_out: Iterable[str]) -> None:
        self._texts = [words(normalise(text)) for text in held_out]
        self._sets = [frozenset(tokens) for tokens in self._texts]
        self._whole = {tuple(tokens) for tokens in self._texts}
        self._by_ngram: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, tokens in enumerate(self._texts):
            for ngram in _ngrams(tokens):
                self._by_ngram[ngram].append(number)

    def repeats(self, text: str) -> bool:
        """Whether ``text`` nearly repeats a held-out text."""
        tokens = words(normalise(text))
        if tuple(tokens) in self._whole:
            return True
        own = frozenset(tokens)
        found = [self._by_ngram.get(ngram, []) for ngram in _ngrams(tokens)]
        candidates = {number for numbers in found if len(numbers) <= COMMON for number in numbers}
        return any(_jaccard(own, self._sets[number]) >= MIN_JACCARD for number in candidates)


def _ngrams(tokens: list[str]) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)}


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 0.0
