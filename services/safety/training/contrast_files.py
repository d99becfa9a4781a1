"""The files of the contrast corpus, read and checked; ``contrast.py`` makes rows of them."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from services.contracts.errors import DataError
from services.contracts.hazards import HazardCategory
from services.safety.training.rows import Row, is_held_out

FOLDER = Path(__file__).parent / "data" / "contrast"
FRAMES = "frames.toml"
# The lists of the frames, and how many gaps each of their texts has.
FRAME_GAPS = {"neutral": 1, "turned": 1, "disguised": 1, "before": 0, "after": 0}


@dataclass(frozen=True)
class Entry:
    """One alarming word with harmful and with harmless texts; the keys of an ``[[entry]]``.

    Args:
        category: the hazard of the harmful side.
        word: the alarming word; every act holds it, whatever the case or the ending.
        harmful: verb phrases (infinitives without "to") that mean harm.
        harmless: verb phrases with the same word that do not.
        harmful_prompts: whole prompts that ask for harm.
        harmless_prompts: whole prompts that do not.
    """

    category: HazardCategory
    word: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_prompts: tuple[str, ...]
    harmless_prompts: tuple[str, ...]

    def all_harmful(self) -> tuple[str, ...]:
        """Every text of the harmful side."""
        return self.harmful + self.harmful_prompts

    def all_harmless(self) -> tuple[str, ...]:
        """Every text of the harmless side."""
        return self.harmless + self.harmless_prompts

    def row(self, text: str, unsafe: bool, source: str) -> Row:
        """A row of this entry: grouped by the word, with the category on the harmful side only."""
        return Row(text, unsafe, source, category=self.category if unsafe else None, group=self.word)

    def decile(self) -> int:
        """1..10: entries of one decile stand on the same side of every split by a multiple of 10 %."""
        return next(tenth for tenth in range(1, 11) if is_held_out(self.word, 10 * tenth))


@dataclass(frozen=True)
class Statement:
    """Statements about one subject that do harm, and harmless ones; the keys of a ``[[statement]]``."""

    category: HazardCategory
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]

    def all_harmful(self) -> tuple[str, ...]:
        """Every text of the harmful side."""
        return self.harmful

    def all_harmless(self) -> tuple[str, ...]:
        """Every text of the harmless side."""
        return self.harmless


@dataclass(frozen=True)
class Corpus:
    """Everything that the folder holds; the frames by the name of their list."""

    entries: tuple[Entry, ...]
    statements: tuple[Statement, ...]
    frames: dict[str, tuple[str, ...]]


def read_corpus(folder: Path) -> Corpus:
    """The frames, and the entries and statements of every other TOML file in ``folder``.

    Raises:
        DataError: a file is missing or malformed; the message names the file and the entry.
    """
    entries: list[Entry] = []
    statements: list[Statement] = []
    for path in sorted(path for path in folder.glob("*.toml") if path.name != FRAMES):
        tables = _tables_of(path)
        entries += [_entry(path, number, given) for number, given in enumerate(tables.get("entry", []), 1)]
        statements += [_statement(path, number, given) for number, given in enumerate(tables.get("statement", []), 1)]
    if not entries:
        raise DataError(f"{folder}: no [[entry]] in any TOML file here; the contrast corpus needs at least one")
    _check_sides(folder, [*entries, *statements])
    return Corpus(tuple(entries), tuple(statements), _frames(folder / FRAMES))


def _check_sides(folder: Path, tables: list[Entry | Statement]) -> None:
    harmful = {text.lower() for table in tables for text in table.all_harmful()}
    harmless = {text.lower() for table in tables for text in table.all_harmless()}
    if both := harmful & harmless:
        raise DataError(f"{folder}: on both sides: {_listed(map(repr, both))}; keep each on one")


def _frames(path: Path) -> dict[str, tuple[str, ...]]:
    frames = _toml(path)
    if wrong := set(FRAME_GAPS) ^ set(frames):
        raise DataError(f"{path}: missing or unknown list: {_listed(wrong)}; it holds {_listed(FRAME_GAPS)}")
    return {name: _texts(f"{path}: {name}", frames[name], gaps) for name, gaps in FRAME_GAPS.items()}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it belongs to the contrast corpus") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TOML file: {error}") from error


def _tables_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    tables = _toml(path)
    for name, found in tables.items():
        if name not in ("entry", "statement") or not (isinstance(found, list) and all(type(t) is dict for t in found)):
            raise DataError(
                f"{path}: {name}: a contrast file holds [[entry]] and [[statement]] tables and nothing else"
            )
    return tables


def _entry(path: Path, number: int, given: dict[str, Any]) -> Entry:
    where = f"{path}: entry {number} ({given.get('word', 'without a word')})"
    category = _category(where, Entry, given)
    word = given["word"]
    if not isinstance(word, str) or not word.strip():
        raise DataError(f"{where}: the word must be a text that is not empty")
    lists = {name: _texts(f"{where}: {name}", given[name]) for name in _names(Entry) - {"category", "word"}}
    for act in lists["harmful"] + lists["harmless"]:
        if _stem(word) not in act.lower():
            raise DataError(f"{where}: the act {act!r} does not hold the word")
    return Entry(category, word, **lists)


def _statement(path: Path, number: int, given: dict[str, Any]) -> Statement:
    where = f"{path}: statement {number}"
    category = _category(where, Statement, given)
    harmful, harmless = (_texts(f"{where}: {name}", given[name]) for name in ("harmful", "harmless"))
    return Statement(category, harmful, harmless)


def _category(where: str, kind: type[Entry] | type[Statement], given: dict[str, Any]) -> HazardCategory:
    """The hazard of a table that has exactly the keys of ``kind``."""
    if wrong := _names(kind) ^ set(given):
        raise DataError(f"{where}: missing or unknown key: {_listed(wrong)}")
    if given["category"] not in list(HazardCategory):
        raise DataError(f"{where}: unknown category {given['category']!r}; use S1 to S14")
    return HazardCategory(given["category"])


def _texts(where: str, texts: object, gaps: int = 0) -> tuple[str, ...]:
    """The list of ``texts``, each with as many ``{x}`` as ``gaps`` says and no other brace."""
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where} must be a list that is not empty")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {text!r} must be a text that is not empty")
        if text.count("{x}") != gaps or text.count("{") != gaps:
            raise DataError(f"{where}: {text!r} must have {'one gap {x}' if gaps else 'no gap'}")
    return tuple(texts)


def _stem(word: str) -> str:
    """What the word's forms share: "strangl" of strangle and strangling, "bull" of bully and bullied."""
    return word.lower().rstrip("ey")


def _names(kind: type[Entry] | type[Statement]) -> set[str]:
    return {field.name for field in fields(kind)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
