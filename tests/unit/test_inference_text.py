"""Incremental decoding and stop strings: what is sent is whole characters, and never a part of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.text import INCOMPLETE, Detokenizer, StopScanner
from tests.fakes.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer()
ids_of_any_kind = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@given(st.text(alphabet=st.characters(exclude_characters=INCOMPLETE, exclude_categories=["Cs"]), max_size=30))
def test_any_text_arrives_whole_and_never_half_a_character(text: str) -> None:
    given_out = pieces(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert "".join(given_out) == text
    assert all(INCOMPLETE not in piece for piece in given_out)


@given(ids_of_any_kind)
def test_any_tokens_give_the_text_of_decoding_them_at_once(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == decode(ids)


def test_emoji_of_several_tokens_comes_with_its_last_token() -> None:
    ids = TOKENIZER("a🦜b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 4
    assert [piece for piece in pieces(ids) if piece] == ["a", "🦜", "b"]


def scan(texts: list[str], stops: list[str], *, keep: bool = False) -> tuple[list[str], bool]:
    scanner = StopScanner(stops, keep=keep)
    released = []
    for text in texts:
        released.append(scanner.add(text))
        if scanner.found:
            return released, True
    return [*released, scanner.flush()], False


@pytest.mark.parametrize(
    ("texts", "stops", "released"),
    [
        (["one two"], ["two"], ["one "]),
        (["one t", "wo three"], ["two"], ["one ", ""]),
        (["on", "e"], ["even"], ["on", "", "e"]),
        (["a\n", "\nb"], ["\n\n"], ["a", ""]),
        (["xay", "z"], ["yz", "a"], ["x"]),
        (["abc"], [], ["abc", ""]),
    ],
)
def test_stop_string_ends_the_text(texts: list[str], stops: list[str], released: list[str]) -> None:
    assert scan(texts, stops)[0] == released


def test_kept_stop_string_ends_the_text_as_in_tgi() -> None:
    assert scan(["one t", "wo three"], ["two"], keep=True) == (["one ", "two"], True)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_before_the_first_stop_string_arrives_however_it_is_cut(texts: list[str], stops: list[str]) -> None:
    whole = "".join(texts)
    places = [whole.find(stop) for stop in stops if stop in whole]
    released, found = scan(texts, stops)
    assert found == bool(places)
    if not found:
        assert "".join(released) == whole
    else:
        # The first stop string to be complete ends the text; what was sent before it begins the whole text.
        assert whole.startswith("".join(released))
        assert not any(stop in "".join(released) for stop in stops)
