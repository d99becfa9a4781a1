"""Undoing disguises that respell words: leetspeak, rot13, reversal, borrowed alphabets.

Each function returns the text as it is unless the respelled words are known English and the written ones are not,
so ordinary text of any language passes unchanged.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable
from itertools import groupby, product
from operator import itemgetter

from services.safety.evasion.english import (
    KNOWN_SHARE,
    LONGEST,
    SWITCH,
    evidence,
    known,
    known_share,
    runs,
    strangeness,
)
from services.safety.evasion.lookalikes import latin

_PLAIN_WORD = re.compile(r"(?<![^\W_])[A-Za-z]{1,64}(?![^\W_])")
_ANY_WORD = re.compile(r"[^\W_]+(?:['\u0300-\u036f]+[^\W_]+)*")
_FRAGMENT = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?")
_LEET = {
    "0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b", "9": "g",
    "@": "a", "$": "s", "!": "il", "|": "il", "+": "t", "€": "e", "£": "l", "¢": "c", "(": "c", "¥": "y",
}  # fmt: skip
_LEET_TOKEN = re.compile(r"[A-Za-z0-9@$!|+€£¢¥(]+")
_LEET_INSIDE = re.compile(
    r"[A-Za-z][0-9@$!|+€£¢¥(]+[A-Za-z]|[A-Za-z].*[0-9@$|€£¢¥].*[A-Za-z]|^[0-9@$|][A-Za-z]|[A-Za-z][0-9@$|]$"
)
_UPSIDE_DOWN = str.maketrans(
    "ɐqɔpǝɟƃɓɥᴉıɾʞlɯuodbɹsʇnʌʍxʎz∀ƎℲ⅁ſԀ∩Λ⅄ʃ¡¿‾", "abcdefggh" "iijklmnopqrstuvwxyzAEFGJPUVYJ!?_"
)  # fmt: skip
_TURNED = re.compile("[ɐɔǝɟƃɓɥᴉɾʞɯɹʇʌʍʎ∀ƎℲ⅁Ԁ⅄]")


def unleet(text: str) -> str:
    """Leetspeak ("h0w t0 b4k3") read as letters, where that makes known words."""
    tokens = list(_LEET_TOKEN.finditer(text))
    suspects = {n: _unleeted(t[0]) for n, t in enumerate(tokens) if _is_suspect(t[0])}
    clear = {n: word for n, word in suspects.items() if len(word) > 2 and known(_letters(word))}
    if not clear:
        return text
    if len(clear) > 1 and 4 * len(clear) > len(suspects):  # a whole text in this style: the rest follows suit
        suspects |= {n: _unleeted(t[0]) for n, t in enumerate(tokens) if n not in suspects and not t[0].isalpha()}
        clear |= {
            n: w for n, w in suspects.items() if known(_letters(w)) or (len(w) > 3 and not tokens[n][0].isdigit())
        }
    out: list[str] = []
    position = 0
    for number, word in sorted(clear.items()):
        out += [text[position : tokens[number].start()], word]
        position = tokens[number].end()
    return "".join([*out, text[position:]])


def _is_suspect(token: str) -> bool:
    return len(token) <= LONGEST + 4 and not token.isalpha() and bool(_LEET_INSIDE.search(token))


def _letters(word: str) -> str:
    return word.rstrip("!|(").casefold()


def _unleeted(token: str) -> str:
    """The reading of a leet token that looks most like English; a mark at its end may be punctuation."""
    core = token[: LONGEST + 4].casefold()
    options = [_LEET.get(char, char) for char in core]
    ambiguous = 0
    for number, option in enumerate(options):
        ambiguous += len(option) > 1
        if ambiguous > 4:
            options[number] = option[0]
    readings = ["".join(choice) for choice in product(*options)]
    bare = core.rstrip("!|(+$")
    readings += [reading[: len(bare)] for reading in readings if 0 < len(bare) < len(core)]
    best = min(dict.fromkeys(readings), key=lambda word: (not known(word), strangeness(word)))
    return best + token[len(core) :]


def rotated_or_reversed(text: str) -> list[str]:
    """What the text says when runs of it are in rot13, or written backwards, as a whole or word by word.

    Those of the three that make a difference, the most English one first: short backward words may look like rot13.
    """
    if all(known(word.casefold()) for word in _PLAIN_WORD.findall(text)):
        return []
    options = (
        _respelled(text, _PLAIN_WORD, lambda word: codecs.encode(word, "rot13")),
        _respelled(text, _PLAIN_WORD, lambda word: word[::-1]),
        _respelled(text, _PLAIN_WORD, lambda word: word[::-1], backwards=True),
    )
    changed = [option for option in dict.fromkeys(options) if option != text]
    return sorted(changed, key=lambda option: -known_share(_FRAGMENT.findall(option)))


def unborrow(text: str) -> str:
    """Words wholly in letters of another alphabet, or under accents, that look like English words."""
    if text.isascii():
        return text
    words = list(dict.fromkeys(_ANY_WORD.findall(text)))
    if sum(_gain(word, _as_latin(word)) for word in words) > 2 * SWITCH - 2 or _all_borrowed(words):
        return _ANY_WORD.sub(lambda found: _as_latin(found[0]), text)
    return _respelled(text, _ANY_WORD, _as_latin, _gain)


def turn(text: str) -> str:
    """Upside-down text, read from its end."""
    if len(_TURNED.findall(text)) < 3:
        return text
    turned = text[::-1].translate(_UPSIDE_DOWN)
    words = _FRAGMENT.findall(turned)
    return turned if known_share(words) >= KNOWN_SHARE else text


def _as_latin(word: str) -> str:
    """A word's letters without marks, each as the Latin letter that it looks like."""
    bare = "".join(char for char in unicodedata.normalize("NFD", word) if not unicodedata.combining(char))
    return "".join(char if char.isascii() else latin(char) for char in bare)


def _all_borrowed(words: list[str]) -> bool:
    """Whether the plain words are English and so are, once read as Latin, all that are not plain."""
    plain = [word for word in words if word.isascii()]
    others = [word for word in words if not word.isascii()]
    return all(_foreign(w) and known(_as_latin(w).casefold()) for w in others) and known_share(plain) > KNOWN_SHARE


def _foreign(word: str) -> bool:
    return 2 * sum(not char.isascii() for char in word) >= len(word)


def _gain(word: str, other: str) -> float:
    """The evidence that a word is borrowed. Unknown plain words speak against it: they are of another language."""
    lower = other.casefold()
    if word.isascii():
        return 0.0 if known(lower) or not lower.isalpha() else -0.5 * len(lower)
    foreign = sum(not char.isascii() for char in word)
    if not known(lower) or not lower.isascii():
        return -2.0 * foreign
    return (2.0 if _foreign(word) else 0.5) * len(lower) if len(word) > 1 else 0.0


def _case_blind_evidence(word: str, other: str) -> float:
    return evidence(word.casefold(), other.casefold())


def _respelled(
    text: str,
    pattern: "re.Pattern[str]",
    respell: Callable[[str], str],
    gain: Callable[[str, str], float] = _case_blind_evidence,
    backwards: bool = False,
) -> str:
    """The text with each run of disguised words respelled; with ``backwards``, whole runs are turned around instead."""

    def better(word: str) -> str:
        other = respell(word)
        return word if known(word.casefold()) and not known(other.casefold()) else other

    tokens = list(pattern.finditer(text))
    others = [respell(token[0]) for token in tokens]
    gains = [gain(token[0], other) for token, other in zip(tokens, others, strict=True)]
    if sum(value for value in gains if value > 0) <= 2 * SWITCH:
        return text  # no run can earn its start and its end
    out: list[str] = []
    position = 0
    for disguised, group in groupby(zip(runs(gains), range(len(tokens)), strict=True), key=itemgetter(0)):
        numbers = [number for _, number in group]
        believed = known_share([others[number] for number in numbers]) >= KNOWN_SHARE
        if not disguised or not (believed or sum(gains[number] for number in numbers) > 2.5 * SWITCH):
            continue
        start, end = tokens[numbers[0]].start(), tokens[numbers[-1]].end()
        run = text[start:end]
        out += [text[position:start], run[::-1] if backwards else pattern.sub(lambda found: better(found[0]), run)]
        position = end
    return "".join([*out, text[position:]]) if out else text
