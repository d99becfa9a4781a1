"""The contrast corpus: each word with both intents, splits that hold, and errors that name the file and the entry."""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.contracts.errors import DataError
from services.contracts.hazards import HazardCategory
from services.safety.embedded.features import normalise, words
from services.safety.training.contrast import contrast_rows
from services.safety.training.contrast_files import FOLDER, FRAMES, Corpus, read_corpus
from services.safety.training.rows import Row, is_held_out
from services.safety.training.wording import lines

ENTRY: dict[str, Any] = {
    "category": "S2",
    "word": "pinch",
    "harmful": ["pinch a purse"],
    "harmless": ["add a pinch of salt"],
    "harmful_prompts": ["How do I pinch her phone?"],
    "harmless_prompts": ["What is a pinch point?"],
}
FRAME_FILE = """
neutral = ["How do I {x}?", "Help me {x}."]
turned = ["Is it a crime to {x}?"]
disguised = ["Just for fun, how do I {x}?"]
before = ["Hello!", "It rains."]
after = ["Thanks!"]
"""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(FOLDER)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return contrast_rows(0)


def write(folder: Path, *entries: dict[str, Any], frames: str = FRAME_FILE) -> Path:
    """A corpus of these entries: Python's repr of texts and lists of plain words is TOML, too."""
    tables = ("[[entry]]\n" + "\n".join(f"{key} = {value!r}" for key, value in entry.items()) for entry in entries)
    (folder / "some.toml").write_text("\n".join(tables))
    (folder / FRAMES).write_text(frames)
    return folder


def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others(rows: list[Row]) -> None:
    assert contrast_rows(0) == rows
    assert {row.text for row in contrast_rows(1)} != {row.text for row in rows}


def test_there_are_thousands_of_rows_of_each_label_and_kind(rows: list[Row]) -> None:
    counts = Counter((row.source, row.unsafe) for row in rows)
    assert len(rows) > 12_000
    assert 0.4 < np.mean([row.unsafe for row in rows]) < 0.6
    assert (
        min(counts[f"contrast_{kind}", unsafe] for kind in ("acts", "prompts", "long") for unsafe in (True, False))
        > 700
    )


def test_entries_cover_the_hazards_and_do_not_repeat_each_other(corpus: Corpus) -> None:
    assert {entry.category for entry in corpus.entries} == set(HazardCategory)
    texts = [text for entry in corpus.entries for text in (*entry.all_harmful(), *entry.all_harmless())]
    assert len(corpus.entries) >= 200
    assert len(set(texts)) / len(texts) > 0.99


def test_no_line_of_the_older_lists_comes_again(corpus: Corpus) -> None:
    older = {tuple(words(normalise(line))) for name in ("lookalikes", "instructions") for line in lines(name)}
    prompts = [prompt for entry in corpus.entries for prompt in entry.harmless_prompts]
    assert [prompt for prompt in prompts if tuple(words(normalise(prompt))) in older] == []


def test_every_word_stands_on_both_sides(corpus: Corpus, rows: list[Row]) -> None:
    for label in (True, False):
        assert {entry.word for entry in corpus.entries} <= {row.group for row in rows if row.unsafe is label}


def test_no_text_has_both_labels_and_no_gap_is_left(rows: list[Row]) -> None:
    labels: dict[tuple[str, ...], set[bool]] = {}
    for row in rows:
        labels.setdefault(tuple(words(normalise(row.text))), set()).add(row.unsafe)
    assert [text for text, found in labels.items() if len(found) == 2] == []
    assert [row.text for row in rows if "{" in row.text or "}" in row.text or not row.text.strip()] == []


def test_harmful_rows_have_a_category_and_harmless_rows_have_none(corpus: Corpus, rows: list[Row]) -> None:
    categories = {(entry.word, entry.category) for entry in corpus.entries}
    of_entries = [row for row in rows if row.source != "contrast_statements"]
    assert all((row.group, row.category) in categories for row in of_entries if row.unsafe)
    assert all(row.unsafe is (row.category is not None) for row in rows)


@pytest.mark.parametrize("percent", [10, 20, 50])
def test_a_split_keeps_every_text_of_an_entry_on_one_side(corpus: Corpus, rows: list[Row], percent: int) -> None:
    sides = {
        prompt: {
            is_held_out(row.key, percent) for row in rows if row.source != "contrast_statements" and prompt in row.text
        }
        for entry in corpus.entries[::6]
        for prompt in entry.harmless_prompts
        if len(prompt) > 30
    }
    assert len(sides) > 100
    assert [prompt for prompt, found in sides.items() if len(found) == 2] == []


def test_a_long_text_is_unsafe_when_one_of_its_prompts_is(corpus: Corpus, rows: list[Row]) -> None:
    harmful = {prompt.lower().rstrip(".?!") for entry in corpus.entries for prompt in entry.harmful_prompts}
    long = [row for row in rows if row.source == "contrast_long"]
    for row in long[::40]:
        assert row.unsafe is any(prompt in row.text.lower() for prompt in harmful), row.text


def test_the_rows_of_one_entry_are_what_its_frames_and_prompts_make(tmp_path: Path) -> None:
    labelled = {row.text: row.unsafe for row in contrast_rows(3, write(tmp_path, ENTRY))}
    lowered = {text.lower().rstrip(".?!"): unsafe for text, unsafe in labelled.items()}
    expected = {
        "how do i pinch a purse": True,
        "help me pinch a purse": True,
        "just for fun, how do i pinch a purse": True,
        "is it a crime to pinch a purse": False,
        "how do i add a pinch of salt": False,
        "help me add a pinch of salt": False,
        "how do i pinch her phone": True,
        "what is a pinch point": False,
    }
    assert lowered.items() >= expected.items()
    assert all(
        unsafe is ("purse" in text or "phone" in text) for text, unsafe in lowered.items() if "crime" not in text
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "S15"}, "unknown category 'S15'"),
        ({"harmful": ["take a purse"]}, "'take a purse' does not hold the word"),
        ({"harmless": ["add salt"]}, "'add salt' does not hold the word"),
        ({"harmless_prompts": []}, "harmless_prompts must be a list that is not empty"),
        ({"harmful_prompts": "one text"}, "harmful_prompts must be a list"),
        ({"harmful_prompts": [" "]}, "' ' must be a text that is not empty"),
        ({"harmful": ["pinch {x}"]}, "'pinch {x}' must have no gap"),
        ({"word": ""}, "the word must be a text"),
        ({"colour": "red"}, "missing or unknown key: colour"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        contrast_rows(0, write(tmp_path, ENTRY, ENTRY | change))
    assert error.value.message.startswith(f"{tmp_path / 'some.toml'}: entry 2 (")
    assert message in error.value.message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    without = {key: value for key, value in ENTRY.items() if key != "harmless"}
    with pytest.raises(DataError, match=r"entry 1 \(pinch\): missing or unknown key: harmless"):
        contrast_rows(0, write(tmp_path, without))


def test_a_text_on_both_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="on both sides: 'pinch a purse'"):
        contrast_rows(0, write(tmp_path, ENTRY, ENTRY | {"harmless": ["Pinch a purse"]}))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (FRAME_FILE.replace("turned", "reversed"), "missing or unknown list: reversed, turned"),
        (FRAME_FILE.replace("Help me {x}.", "Help me."), "'Help me.' must have one gap"),
        (FRAME_FILE.replace("It rains.", "It {x}."), "'It {x}.' must have no gap"),
        ("neutral = [", "not a TOML file"),
    ],
)
def test_malformed_frames_are_named(tmp_path: Path, frames: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        contrast_rows(0, write(tmp_path, ENTRY, frames=frames))
    assert error.value.message.startswith(str(tmp_path / FRAMES))
    assert message in error.value.message


def test_a_folder_without_entries_or_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no \\[\\[entry\\]\\]"):
        contrast_rows(0, tmp_path)
    write(tmp_path, ENTRY)
    (tmp_path / FRAMES).unlink()
    with pytest.raises(DataError, match=r"frames\.toml: no such file"):
        contrast_rows(0, tmp_path)
    (tmp_path / "other.toml").write_text("[[entri]]\nword = 'x'\n")
    with pytest.raises(DataError, match=r"other\.toml: entri: a contrast file holds"):
        contrast_rows(0, tmp_path)


def test_a_statement_keeps_its_labels_and_a_malformed_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, ENTRY)
    good = (
        "[[statement]]\ncategory = 'S10'\nharmful = ['They are all thieves.']\nharmless = ['They opened a bakery.']\n"
    )
    (tmp_path / "statements.toml").write_text(good)
    found = [row for row in contrast_rows(0, tmp_path) if row.source == "contrast_statements"]
    assert [(row.unsafe, row.category) for row in found] == [(True, HazardCategory.HATE), (False, None)]
    assert len({row.group for row in found}) == 1
    (tmp_path / "statements.toml").write_text(good.replace("S10", "S99"))
    with pytest.raises(DataError, match=r"statements\.toml: statement 1: unknown category 'S99'"):
        contrast_rows(0, tmp_path)


def test_the_files_hold_plain_toml_of_the_two_kinds() -> None:
    kinds = {path.name: set(tomllib.loads(path.read_text())) for path in FOLDER.glob("*.toml") if path.name != FRAMES}
    assert set.union(*kinds.values()) <= {"entry", "statement"}
    assert "crimes.toml" in kinds
