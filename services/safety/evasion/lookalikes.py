"""The canonical form of a text: what it says once invisible characters and look-alike letters are out of the way.

Ordinary text of any language stays what it is: a Russian or Greek word keeps its letters, and only a word that mixes
its letters with Latin ones is folded. Which letter looks like which comes from decancer (Unicode's confusables and
its own tables); where it is applied is decided here.
"""

import re
import unicodedata
from functools import lru_cache

import decancer_py

MAX_MARKS = 4  # combining marks on one letter; no script in use needs more

# Alphabets from which single letters are borrowed; letters of other scripts are folded only among mostly Latin ones.
_ALPHABETS = frozenset(
    {"CYRILLIC", "GREEK", "COPTIC", "ARMENIAN", "GEORGIAN", "CHEROKEE", "LISU", "CANADIAN", "DESERET", "OSAGE"}
    | {"TIFINAGH", "VAI", "RUNIC", "OLD", "CARIAN", "LYCIAN", "LYDIAN", "OSMANYA", "WARANG", "ELBASAN", "GLAGOLITIC"}
)
# Scripts that stand beside Latin letters without a space between in ordinary text, and are no alphabets.
_NEVER_FOLDED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "YI"})
_SYMBOL_LETTERS = ("LATIN LETTER SMALL CAPITAL", "NEGATIVE CIRCLED LATIN", "NEGATIVE SQUARED LATIN")
# Not in category Cf, but no ink either: joiners, fillers, variation selectors.
_BLANKS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_OVERLAYS = re.compile("[\u0334-\u0338\u0488\u0489\u20d0-\u20f0]")  # strokes and circles over any letter
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
_WORD = re.compile(r"\w[\w\u0300-\u036f]*(?:['\u2019][\w\u0300-\u036f]+)*")
_LATIN_MARKS = re.compile("([A-Za-z\u00c0-\u024f\u1e00-\u1eff])[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\ufe20-\ufe2f]+")
_PILES = re.compile("([A-Za-z])[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\ufe20-\ufe2f]{3,}")  # no spelling has three
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f")
_TAGS = re.compile("[\U000e0020-\U000e007e]+")
_OWN = {"\u1515": "s", "\u157c": "h"}  # Canadian syllabics that decancer reads otherwise or not at all
MIN_HIDDEN = 4  # tag characters outside flags that count as a hidden text


def canonical(text: str) -> str:
    """The text with compatibility forms folded (NFKC), nothing invisible, and no borrowed letters in Latin words.

    Lone surrogates become U+FFFD. Applying it twice changes nothing more.
    """
    visible = text.translate(_CONTROLS)
    if visible.isascii():
        return visible
    well_formed = visible.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    unpiled = _PILES.sub(r"\1", unicodedata.normalize("NFD", _without_invisible(well_formed)))
    composed = _without_invisible(unicodedata.normalize("NFKC", unpiled))
    folded = _WORD.sub(_fold_word, "".join(map(_unsymbolised, composed)))
    unmarked = _LATIN_MARKS.sub(r"\1", unicodedata.normalize("NFKC", folded))
    return unicodedata.normalize("NFKC", _few_marks(unmarked))


def hidden_text(text: str) -> str:
    """What tag characters (U+E0020 and up: invisible, but read by language models) spell, flags of regions aside."""
    spelled = "".join(chr(ord(tag) - 0xE0000) for run in _TAGS.findall(_FLAG.sub("", text)) for tag in run)
    return spelled if len(spelled) >= MIN_HIDDEN else ""


@lru_cache(maxsize=8_192)
def latin(letter: str) -> str:
    """The Latin letters that a character looks like, in its own case; the character itself when there are none."""
    if letter in _OWN:
        return _OWN[letter]
    looks = str(decancer_py.parse(letter, retain_capitalization=True, disable_bidi=True))
    return looks if looks.isascii() and looks.isalpha() else letter


@lru_cache(maxsize=8_192)
def script(letter: str) -> str:
    """The first word of a character's Unicode name, which is its script for letters; '' when it has no name."""
    return unicodedata.name(letter, "").partition(" ")[0]


def _without_invisible(text: str) -> str:
    return "".join(char for char in _OVERLAYS.sub("", _BLANKS.sub("", text)) if not _is_format(char))


@lru_cache(maxsize=8_192)
def _is_format(char: str) -> bool:
    return unicodedata.category(char) == "Cf"


@lru_cache(maxsize=8_192)
def _unsymbolised(char: str) -> str:
    """A letter in the form of a symbol as a letter."""
    return latin(char) if unicodedata.name(char, "").startswith(_SYMBOL_LETTERS) else char


def _fold_word(found: "re.Match[str]") -> str:
    word = found[0]
    if word.isascii():
        return word
    if not any("a" <= char <= "z" or "A" <= char <= "Z" for char in word):
        return word
    borrowed = "".join(latin(char) if script(char) in _ALPHABETS else char for char in word)
    if 2 * sum(char.isascii() for char in borrowed) <= len(borrowed):
        return borrowed
    return "".join(char if script(char) in _NEVER_FOLDED | {"LATIN"} else latin(char) for char in borrowed)


def _few_marks(text: str) -> str:
    """At most ``MAX_MARKS`` combining marks in a row."""
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= MAX_MARKS:
            kept.append(char)
    return "".join(kept)
