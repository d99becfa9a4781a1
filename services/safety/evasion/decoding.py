"""Finding encoded text inside a text and putting what it says in its place.

Base64 (both alphabets, with or without padding, wrapped or spaced), base32, hex, percent-encoding, HTML's numeric
entities and ``\\u``/``\\x``/``U+`` escapes. Something is replaced only when what comes out is readable text: random
identifiers, hashes and binary files decode to bytes that are not.
"""

import base64
import binascii
import codecs
import html
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from services.safety.evasion.english import STRANGE, known, strangeness

MIN_BLOCK = 12  # encoded characters from which on any readable text is believed
MIN_SHORT = 6  # shorter blocks down to this must decode to known words
READABLE_SHARE = 0.6  # of letters, digits and spaces in what was decoded

_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_ENTITY = re.compile(r"&(?:#(?:\d{2,7}|[xX][0-9A-Fa-f]{2,6});?|(?:shy|zwj|zwnj|ZeroWidthSpace|Tab|NewLine);)")
_ESCAPES = re.compile(r"(?:\\u[0-9A-Fa-f]{4}|\\u\{[0-9A-Fa-f]{1,6}\}|\\U[0-9A-Fa-f]{8}|\\x[0-9A-Fa-f]{2})+")
_CODE_POINTS = re.compile(r"(?<!\w)(?:[Uu]\+[0-9A-Fa-f]{4,6}[\s,;]{0,2})+")
_HEX_DIGITS = re.compile(r"[0-9A-Fa-f]+")
_SPACED_HEX = re.compile(
    r"(?<![0-9A-Za-z])(?:(?:0x)?[0-9A-Fa-f]{2}[\s:,;-]{1,2}){3,}(?:0x)?[0-9A-Fa-f]{2}(?![0-9A-Za-z])"
)
_TOKEN = re.compile(r"[A-Za-z0-9+/_-]+={0,6}")
_BASE32 = re.compile(r"[A-Z2-7]{10,}={0,6}")


class Decoded(NamedTuple):
    """A text with its encoded parts replaced, and those parts alone."""

    text: str
    parts: list[str]


def decode(text: str) -> Decoded:
    """Undo one layer of every encoding that is found."""
    parts: list[str] = []

    def replace(pattern: "re.Pattern[str]", reader: Callable[[str], str | None], source: str) -> str:
        def put(found: "re.Match[str]") -> str:
            plain = reader(found[0])
            if plain is None:
                return found[0]
            parts.append(plain.strip())
            return plain

        return pattern.sub(put, source)

    text = _unescaped(text)
    text = replace(_SPACED_HEX, _read_spaced_hex, text)
    return Decoded(_replace_blocks(text, parts), parts)


def _unescaped(text: str) -> str:
    """Escapes of single characters undone, each kind only where it hides letters or digits."""
    for mark, pattern, reader in (
        ("%", _PERCENT, _read_percent),
        ("&", _ENTITY, html.unescape),
        ("\\", _ESCAPES, _read_escapes),
        ("+", _CODE_POINTS, _read_code_points),
    ):
        if mark in text:
            text = _replace_characters(text, pattern, reader)
    return text


def _replace_characters(text: str, pattern: "re.Pattern[str]", reader: Callable[[str], str | None]) -> str:
    hides_letters = False

    def put(found: "re.Match[str]") -> str:
        nonlocal hides_letters
        plain = reader(found[0])
        if plain is None:
            return found[0]
        hides_letters |= any(char.isalnum() or char in " %\\&\u00ad\u200b\u200c\u200d" for char in plain)
        return plain

    unescaped = pattern.sub(put, text)
    return unescaped if hides_letters else text


def _read_percent(escapes: str) -> str | None:
    try:
        return bytes.fromhex(escapes.replace("%", "")).decode()
    except UnicodeDecodeError:
        return None


def _read_escapes(escapes: str) -> str | None:
    """JSON's, JavaScript's and Python's escapes; surrogate pairs become one character."""
    digits = re.findall(r"[0-9A-Fa-f]+", re.sub(r"\\[uUx]\{?", " ", escapes))
    points = [int(number, 16) for number in digits]
    if max(points) > 0x10FFFF:
        return None
    joined = "".join(map(chr, points)).encode("utf-16-le", "surrogatepass")
    return joined.decode("utf-16-le", "replace")


def _read_code_points(escapes: str) -> str | None:
    points = [int(number, 16) for number in re.findall(r"\+([0-9A-Fa-f]+)", escapes)]
    if max(points) > 0x10FFFF or any(0xD800 <= point < 0xE000 for point in points):
        return None
    return "".join(map(chr, points))


def _read_spaced_hex(block: str) -> str | None:
    digits = "".join(re.findall(r"(?<![0-9A-Za-z])(?:0x)?([0-9A-Fa-f]{2})", block))
    return next(_readings_of(digits, (_hex_bytes,)), None)


def _replace_blocks(text: str, parts: list[str]) -> str:
    """Base64, base32 and hex: a run of tokens joined (wrapped or spaced), or else each token alone."""
    pieces: list[str] = []
    position = 0
    for run in _runs(text):
        found = [(token.start(), token.end(), _read_block(token[0])) for token in run]
        if len(run) > 1 and not all(plain and _is_words(plain) for _, _, plain in found):
            whole = _read_block("".join(token[0] for token in run))
            found = [(run[0].start(), run[-1].end(), whole)] if whole else found
        for begin, stop, plain in found:
            if plain is None:
                continue
            pieces += [text[position:begin], plain]
            parts.append(plain)
            position = stop
    return "".join([*pieces, text[position:]])


def _runs(text: str) -> "Iterator[list[re.Match[str]]]":
    """Tokens that only white space parts, up to padding, without the ordinary words at both ends."""
    run: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if run and (run[-1][0].endswith("=") or text[run[-1].end() : token.start()].strip()):
            yield from _trimmed(run)
            run = []
        if run or not _ordinary(token[0]):
            run.append(token)
    yield from _trimmed(run)


def _trimmed(run: "list[re.Match[str]]") -> "Iterator[list[re.Match[str]]]":
    while run and _ordinary(run[-1][0]):
        run.pop()
    if run:
        yield run


def _ordinary(token: str) -> bool:
    """Whether a token has the shape of a word."""
    if len(token) == 1:
        return token in "aAI"
    return token.isalpha() and (token.islower() or token.istitle() or (token.isupper() and len(token) < MIN_BLOCK))


def _read_block(block: str) -> str | None:
    """What an encoded block says; also when it was reversed or rotated by 13 after encoding. None when nothing."""
    core = block.strip("-_") if len(block) < MIN_BLOCK else block
    if len(core) < MIN_SHORT:
        return None
    direct = next(_readings_of(core), None)
    if direct is not None or len(core) < MIN_BLOCK:
        return direct
    for changed in (codecs.encode(core, "rot13"), core[::-1].lstrip("=")):
        for plain in _readings_of(changed):
            return plain
    return None


def _is_long_code(block: str) -> bool:
    """Whether a block is long enough to be no accident when it decodes, and not a mere number."""
    return len(block) >= MIN_BLOCK and not block.isdigit()


def _readings_of(block: str, decoders: Sequence[Callable[[str], bytes | None]] | None = None) -> Iterator[str]:
    for decoder in decoders or (_hex_bytes, _base32_bytes, _base64_bytes):
        raw = decoder(block)
        plain = None if raw is None else _readable(raw)
        if plain is not None and (_is_words(plain) or _is_long_code(block)):
            yield plain


def _hex_bytes(block: str) -> bytes | None:
    digits = block.removeprefix("0x")
    return bytes.fromhex(digits) if len(digits) % 2 == 0 and _HEX_DIGITS.fullmatch(digits) else None


def _base32_bytes(block: str) -> bytes | None:
    core = block.rstrip("=")
    if not _BASE32.fullmatch(core):
        return None
    try:
        return base64.b32decode(core + "=" * (-len(core) % 8))
    except binascii.Error:
        return None


def _base64_bytes(block: str) -> bytes | None:
    core = block.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    core = core[: len(core) - (len(core) % 4 == 1)]
    try:
        return base64.b64decode(core + "=" * (-len(core) % 4), validate=True)
    except binascii.Error:
        return None


def _readable(raw: bytes) -> str | None:
    """The bytes as text, when they are text: UTF-8, printable, and mostly letters, digits and spaces."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    if not text.strip() or not all(char.isprintable() or char in "\t\r\n" for char in text):
        return None
    worded = sum(char.isalnum() or char.isspace() for char in text)
    return text if worded >= READABLE_SHARE * len(text) else None


def _is_words(text: str) -> bool:
    words = [word.strip(string.punctuation) for word in text.casefold().split()]
    likely = (known(word) or (word.isascii() and word.isalpha() and strangeness(word) < STRANGE) for word in words)
    return len(text) >= 4 and all(likely)
