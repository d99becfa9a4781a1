"""Undoing the tricks that hide a request from a classifier, so that it reads what a language model would read.

:func:`readings` gives the texts to score in place of one text; the highest score counts. The first is the canonical
form. Others follow only when something in the text calls for them, so ordinary text in any language has one reading.

Handled, also in parts of a text and nested up to ``ROUNDS`` deep:

* characters (:mod:`services.safety.evasion.lookalikes`): compatibility forms (full-width, mathematical, circled),
  look-alikes from other alphabets, small capitals, invisible characters, soft hyphens, variation selectors, control
  characters, piled-up marks, text hidden in tag characters;
* encodings (:mod:`services.safety.evasion.decoding`): base64, base32, hex, percent-encoding, HTML entities, escapes;
* spaced letters, broken and run-together words (:mod:`services.safety.evasion.spacing`);
* spelling (:mod:`services.safety.evasion.respelling`): leetspeak, rot13, reversed and upside-down text, words wholly in
  borrowed letters or under accents.

Not handled: other Caesar shifts and ciphers, Morse and spelling alphabets, binary or decimal character codes, base58
and base85, compressed data, bytes hidden in variation selectors, letters drawn from several symbols ("|-|", ASCII
art), emoji that stand for letters or words, pig latin, phonetic respelling ("fone", "kewl"), misspellings, synonyms,
other languages, spelling tricks on top of each other (rot13 of leetspeak, reversed rot13, spaced rot13), and
instructions that have the model put the request together. The spelling tricks are recognised by English words only.
"""

from collections.abc import Callable

from services.safety.evasion.decoding import decode
from services.safety.evasion.lookalikes import canonical, hidden_text
from services.safety.evasion.respelling import rotated_or_reversed, turn, unborrow, unleet
from services.safety.evasion.spacing import join_letters, mend, split_glued

ROUNDS = 3
MAX_READINGS = 6
MAX_GROWTH = 4  # all readings together, as a multiple of the text's or the canonical form's length
MIN_ALONE = 12  # characters of decoded text that are also read without what stands around them


def _only(respell: Callable[[str], str]) -> Callable[[str], list[str]]:
    """A respelling that knows one other form, as one that gives a list."""
    return lambda text: [other for other in (respell(text),) if other != text]


# Each gives the other forms of a text that it finds, the likeliest first. The order matters: letters are brought
# together and made plain before words are looked at.
_RESPELLINGS = (
    *map(_only, (unborrow, turn, join_letters, unleet)),
    rotated_or_reversed,
    *map(_only, (mend, split_glued)),
)


def readings(text: str) -> list[str]:
    """The texts to classify in place of ``text``: its canonical form, then what it says once disguises are undone.

    At most ``MAX_READINGS``, together at most ``MAX_GROWTH`` times as long as the text or its canonical form, whichever
    is longer (a single compatibility character can stand for up to 18). Never raises.
    """
    plain = canonical(text)
    hidden = hidden_text(text)
    found, parts = _undone(f"{plain}\n{hidden}" if hidden else plain)
    alone = "\n".join([hidden, *parts]).strip()
    candidates = [*found[-1:], *([alone] if len(alone) >= MIN_ALONE else []), *reversed(found)]
    return _within_bounds(plain, candidates, (MAX_GROWTH - 1) * max(len(text), len(plain)))


def _undone(text: str) -> tuple[list[str], list[str]]:
    """The text after each step that changed it, and the decoded parts of the last round that found any."""
    found: list[str] = []
    parts: list[str] = []
    for _ in range(ROUNDS):
        before = text
        decoded = decode(text)
        parts = decoded.parts or parts
        text = canonical(decoded.text)
        found += [text] if text != before else []
        for respell in _RESPELLINGS:
            options = respell(text)
            found += reversed(options)
            text = options[0] if options else text
        if text == before:
            break
    return found, parts


def _within_bounds(plain: str, candidates: list[str], room: int) -> list[str]:
    """``plain``, and the distinct candidates as far as their number and ``room`` (characters) allow."""
    kept = [plain]
    for candidate in dict.fromkeys(candidates):
        if candidate not in kept and len(kept) < MAX_READINGS and len(candidate) <= room:
            kept.append(candidate)
            room -= len(candidate)
    return kept
