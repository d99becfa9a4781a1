"""The file of prompts with declining, complying and harmful answers, and its reader."""

from collections import Counter
from pathlib import Path

import pytest

from services.contracts.errors import DataError
from services.safety.training.exchanges import Exchange, exchange_answers, exchanges

GOOD = '[[exchange]]\nprompt = "Say no."\ndeclines = ["No."]\n'


def _file(folder: Path, text: str) -> Path:
    path = folder / "some_answers.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_entry_keeps_its_sides_and_a_missing_side_is_empty(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD + 'harmful = ["Sure, let us do it."]\n')
    assert exchanges(path) == [Exchange("Say no.", ("No.",), (), ("Sure, let us do it.",))]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected"),
        ("exchange = []", "expected"),
        ("exchange = [3]", "exchange 1"),
        (GOOD + '[other]\nx = "y"\n', "other"),
        ("[[exchange", "TOML"),
        (GOOD + GOOD.replace("declines", "refuses"), "exchange 2: unknown keys ['refuses']"),
        (GOOD.replace("Say no.", "  "), "exchange 1: give a prompt"),
        (GOOD.replace('prompt = "Say no."', "prompt = 3"), "exchange 1: give a prompt"),
        (GOOD.replace('["No."]', '"No."'), "exchange 1: declines must be a list"),
        (GOOD.replace('["No."]', '["No.", " "]'), "exchange 1: declines must be a list"),
        (GOOD.replace('["No."]', "[]"), "exchange 1: give answers"),
        (GOOD + 'complies = ["No."]\n', "exchange 1: give answers, each on one side and once; repeated: ['No.']"),
    ],
)
def test_malformed_content_names_the_file_and_the_entry(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        exchanges(_file(tmp_path, text))
    assert "some_answers.toml" in caught.value.message
    assert complaint in caught.value.message


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        exchanges(tmp_path / "absent.toml")


def test_the_shipped_answers_carry_the_labels_of_their_side() -> None:
    answers = {(answer.group, answer.text): answer for answer in exchange_answers()}
    for exchange in exchanges():
        for texts, labels in (
            (exchange.declines, (False, True)),
            (exchange.complies, (False, False)),
            (exchange.harmful, (True, False)),
        ):
            for text in texts:
                answer = answers[exchange.prompt, text]
                assert (answer.unsafe, answer.refused) == labels
                assert answer.source == "own_exchanges"


def test_the_shipped_file_has_many_answers_of_each_kind_and_each_prompt_once() -> None:
    given = exchanges()
    assert len(given) >= 160
    assert len({exchange.prompt for exchange in given}) == len(given)
    assert sum(len(exchange.declines) for exchange in given) >= 550
    assert sum(len(exchange.complies) for exchange in given) >= 350
    assert sum(len(exchange.harmful) for exchange in given) >= 150


def test_no_shipped_text_has_contradicting_labels() -> None:
    labels = {(answer.text, answer.unsafe, answer.refused) for answer in exchange_answers()}
    assert [text for text, sides in Counter(text for text, _, _ in labels).items() if sides > 1] == []
