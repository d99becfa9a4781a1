"""Our own prompts with several answers each: answers that decline, that comply harmlessly, that go along with harm.

``data/answers.toml`` holds them. All answers to one prompt share a group, so that a split never parts them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.contracts.errors import DataError
from services.safety.training.answers import Answer

ANSWERS_FILE = Path(__file__).parent / "data" / "answers.toml"
_SIDES = ("declines", "complies", "harmful")


@dataclass(frozen=True)
class Exchange:
    """A prompt and answers to it, by what they do; the three sides have no text in common."""

    prompt: str
    declines: tuple[str, ...]
    complies: tuple[str, ...]
    harmful: tuple[str, ...]


def exchanges(path: Path = ANSWERS_FILE) -> list[Exchange]:
    """The exchanges of ``path``, in its order; raises DataError that names the file and the entry at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: cannot be read as TOML ({error}); restore or correct the file") from error
    entries = document.get("exchange")
    if set(document) != {"exchange"} or not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected [[exchange]] tables and nothing else; found {sorted(document) or 'nothing'}")
    return [_exchange(entry, f"{path}: exchange {number}") for number, entry in enumerate(entries, 1)]


def exchange_answers() -> list[Answer]:
    """Every answer of the file with the labels of both heads, grouped by its prompt."""
    return [
        Answer(text, unsafe, refused, "own_exchanges", group=exchange.prompt)
        for exchange in exchanges()
        for texts, unsafe, refused in (
            (exchange.declines, False, True),
            (exchange.complies, False, False),
            (exchange.harmful, True, False),
        )
        for text in texts
    ]


def _exchange(entry: object, where: str) -> Exchange:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected a table with a prompt and its answers")
    unknown = set(entry) - {"prompt", *_SIDES}
    if unknown:
        raise DataError(f"{where}: unknown keys {sorted(unknown)}; use prompt, {', '.join(_SIDES)}")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: give a prompt that is not empty")
    sides = [_texts(entry, side, where) for side in _SIDES]
    texts = [text for side in sides for text in side]
    repeated = {text for text in texts if texts.count(text) > 1}
    if not texts or repeated:
        raise DataError(f"{where}: give answers, each on one side and once; repeated: {sorted(repeated)}")
    return Exchange(prompt, *sides)


def _texts(entry: Mapping[str, object], side: str, where: str) -> tuple[str, ...]:
    given = entry.get(side, [])
    if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
        raise DataError(f"{where}: {side} must be a list of texts that are not empty")
    return tuple(given)
