"""Undoing disguises made of white space and marks: spaced letters, broken words, words without spaces between.

Each function returns the text as it is unless what comes out is known English, so ordinary text passes unchanged.
"""

import re
from collections import Counter
from itertools import accumulate, pairwise

from services.safety.evasion.english import KNOWN_SHARE, LONGEST, known, known_share, listed, segment
from services.safety.evasion.respelling import unleet

MIN_SPACED = 4  # single letters in a row that count as a spaced-out word
LONGEST_GAP = 8  # characters between two such letters
MIN_GLUED = 20  # letters of what must be several words without spaces
MIN_CUT = 6  # letters of a word that is cut up once a text is known to be without spaces

_SPACED_TOKEN = re.compile(r"[^\W_]+|(?<!\S)[@$!|](?!\S)")
_FRAGMENT = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?")
_MENDABLE = re.compile(r"[\s._*~|\\/-]{1,3}")


def join_letters(text: str) -> str:
    """Words whose letters stand apart ("h o w", "h.o.w", one letter to a line) joined; words keep a space between."""
    out: list[str] = []
    position = 0
    for run in _letter_runs(text):
        joined = _joined(text, run)
        if joined is not None:
            out += [text[position : run[0].start()], joined]
            position = run[-1].end()
    return "".join([*out, text[position:]]) if out else text


def _letter_runs(text: str) -> "list[list[re.Match[str]]]":
    found: list[list[re.Match[str]]] = [[]]
    for token in _SPACED_TOKEN.finditer(text):
        single = len(token[0]) == 1 and token[0].isascii()
        if single and found[-1] and token.start() - found[-1][-1].end() > LONGEST_GAP:
            found.append([])
        if single:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if len(run) >= MIN_SPACED]


def _joined(text: str, run: "list[re.Match[str]]") -> str | None:
    """The words of a run of single letters, or None when they are not English (a list of initials, a matrix row)."""
    gaps = [text[left.end() : right.start()] for left, right in pairwise(run)]
    between_words = _word_gaps(gaps)
    letters = run[0][0] + "".join(
        f"{' ' if gap_is_wide else ''}{token[0]}" for gap_is_wide, token in zip(between_words, run[1:], strict=True)
    )
    plain = unleet(letters) if not letters.replace(" ", "").isalpha() else letters
    words = [word for glued in plain.split() for word in _cut(glued)]
    return " ".join(words) if known_share(words) >= KNOWN_SHARE and max(map(len, words)) > 2 else None


def _word_gaps(gaps: list[str]) -> list[bool]:
    """Which gaps part words: those with white space where most have none, else those wider than the usual one."""
    blank = [any(char.isspace() for char in gap) for gap in gaps]
    if 2 * sum(blank) <= len(gaps):
        return blank
    usual = min(
        Counter(len(gap) for gap, is_blank in zip(gaps, blank, strict=True) if is_blank).items(), key=_commonest
    )
    return [is_blank and len(gap) > usual[0] for gap, is_blank in zip(gaps, blank, strict=True)]


def _commonest(item: tuple[int, int]) -> tuple[int, int]:
    return -item[1], item[0]


def _cut(letters: str) -> list[str]:
    """A word, or the words that were written without spaces between them."""
    lower = letters.casefold()
    if known(lower) or not lower.isascii() or not lower.isalpha() or len(lower) < MIN_SPACED:
        return [letters]
    words, share = segment(lower)
    ends = [0, *accumulate(map(len, words))]
    return [letters[start:end] for start, end in pairwise(ends)] if share >= KNOWN_SHARE else [letters]


def split_glued(text: str) -> str:
    """Words run together ("bakebreadathome") parted, when they are most of the text."""
    glued = [found for found in _FRAGMENT.finditer(text) if len(found[0]) >= MIN_GLUED]
    if 2 * sum(len(found[0]) for found in glued) < sum(char.isalpha() for char in text):
        return text
    return _FRAGMENT.sub(lambda found: _parted(found[0]), text)


def _parted(word: str) -> str:
    if len(word) < MIN_CUT or known(word.casefold()):
        return word
    words, share = segment(word.casefold())
    return " ".join(words) if share > 0.8 else word


def mend(text: str) -> str:
    """Words broken by a space, a line end or a mark ("bre ad", "br-ead") put together again."""
    pieces = list(_FRAGMENT.finditer(text))
    out: list[str] = []
    position = number = 0
    while number < len(pieces):
        count = _broken(text, pieces[number : number + 4])
        if count:
            last = pieces[number + count - 1]
            out += [text[position : pieces[number].start()], *(piece[0] for piece in pieces[number : number + count])]
            position = last.end()
        number += max(1, count)
    return "".join([*out, text[position:]]) if out else text


def _broken(text: str, pieces: "list[re.Match[str]]") -> int:
    """How many of the pieces make one known word, none of it a word that makes sense alone; 0 for none."""
    if all(known(piece[0].casefold()) for piece in pieces):
        return 0
    for count in range(len(pieces), 1, -1):
        some = pieces[:count]
        gaps = [text[left.end() : right.start()] for left, right in pairwise(some)]
        word = "".join(piece[0] for piece in some).casefold()
        unknown = sum(not known(piece[0].casefold()) for piece in some)
        prefix = len(some[0][0]) < 3 and "-" in gaps[0]  # "e-mail", "re-use": spelling, not a disguise
        if prefix or 2 * unknown < count or not 5 <= len(word) <= LONGEST or not all(map(_MENDABLE.fullmatch, gaps)):
            continue
        if listed(word) if min(len(piece[0]) for piece in some) == 1 else known(word):
            return count
    return 0
