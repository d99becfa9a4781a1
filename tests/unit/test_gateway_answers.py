"""What of an answer is put before the classifier beside its plain text."""

import pytest

from gateway.answers import Call, Head, Part, Token, checked_name, texts_to_check, token_texts
from gateway.asked import strings_in
from services.contracts.errors import UpstreamUnavailable


def tokens(*texts: tuple[str, ...]) -> list[Token]:
    return [Token({}, text) for text in texts]


@pytest.mark.parametrize(
    ("told", "text", "shown"),
    [
        ([], "", []),
        ([("One ",), ("two",)], "One two", []),
        ([("One ",), ("two",)], "Three", ["One two"]),
        ([("One ", "Uno "), ("two", "dos")], "One two", ["Uno dos"]),
        ([("One ", "One ", "Uno "), ("two", "two", "dos")], "One two", ["Uno dos"]),
        ([("One ", "Uno "), ("two",)], "One two", ["Uno "]),
        ([("One ", "a", "b"), ("two", "c", "d")], "One two", ["ac\nbd"]),
    ],
)
def test_tokens_show_what_their_text_does_not_say(told: list[tuple[str, ...]], text: str, shown: list[str]) -> None:
    assert list(token_texts(tokens(*told), text)) == shown


def test_call_is_checked_as_written_and_as_meant() -> None:
    part = Part.of_call(0, "tool_calls", Call(0, "1", "find", '{"a\\u0062": ["\\u0063", 1]}'))
    assert list(texts_to_check([part])) == [
        'find\n{"a\\u0062": ["\\u0063", 1]}',
        '{"a\\u0062": ["\\u0063", 1]}\nab\nc',
    ]


def test_strings_come_in_order_with_names_and_what_they_stand_for() -> None:
    value = {"a": ["b", {"c": None, "d": 1}], "e": '"f\\"g"'}
    assert list(strings_in(value, "h")) == ["a", "b", "c", "d", "e", '"f\\"g"', 'f"g', "h"]


def test_deeply_nested_strings_are_found() -> None:
    value: object = "deep"
    for _ in range(50_000):
        value = [value]
    assert list(strings_in(value)) == ["deep"]


@pytest.mark.parametrize("name", ["a name", "x" * 201, "é", "a\nb"])
def test_text_is_no_name(name: str) -> None:
    with pytest.raises(UpstreamUnavailable):
        checked_name(name)


def test_own_head_has_the_protocols_prefix() -> None:
    assert Head.own("cmpl-", "m").id.startswith("cmpl-")
