"""What of an answer is put before the classifier beside its plain text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import Call, Head, Part, Token, checked_call_id, texts_to_check, token_texts
from gateway.asked import strings_in
from gateway.protocols import chat
from gateway.protocols.openai_fields import token_text
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


PARTS = ["a ", "bytes:\\xe6\\x9d", "bytes:\\xb1", " bytes:x"]


def test_parts_of_a_character_are_read_as_the_character() -> None:
    told = tokens(*((token_text(part), token_text(part)) for part in PARTS))
    assert list(token_texts(told, "")) == ["a \u6771 bytes:x\na \u6771 bytes:x"]
    assert list(token_texts(told, "a \u6771 bytes:x")) == []


@pytest.mark.parametrize(
    ("token", "given", "left"),
    [
        ("é", [195, 169], [195, 169]),
        ("bytes:\\xe6\\x9d", [230, 157], [230, 157]),
        ("a", [98], None),
        ("a", [97, 98], None),
        ("a", None, None),
        ("\ufffd", [230], None),
        ("a", [97, 999], None),
    ],
)
def test_bytes_leave_only_where_they_are_the_tokens_own(
    token: str, given: list[int] | None, left: list[int] | None
) -> None:
    logprobs = {"content": [{"token": token, "logprob": -1, "bytes": given}]}
    choice = {"index": 0, "message": {"content": "a"}, "finish_reason": "stop", "logprobs": logprobs}
    [part] = chat.read_whole(json.dumps({"id": "1", "choices": [choice]}), Head.own("", "m")).parts
    assert part.tokens[0].shape["bytes"] == left


def test_call_is_checked_as_written_and_as_meant() -> None:
    part = Part.of_call(0, "tool_calls", Call(0, "call-1", "find", '{"a\\u0062": ["\\u0063", 1]}'))
    assert list(texts_to_check([part])) == [
        'find\n{"a\\u0062": ["\\u0063", 1]}',
        "call-1",
        '{"a\\u0062": ["\\u0063", 1]}\nab\nc',
    ]


def test_strings_come_in_order_with_names_and_what_they_stand_for() -> None:
    value = {"a": ["b", {"c": None, "d": 1}], "e": '"f\\"g"'}
    assert list(strings_in(value, "h")) == ["a", "b", "c", "d", "e", '"f\\"g"', 'f"g', "h"]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\\u0068idden"}',
        '{"a": "\\u0068idden", "b": ' + "9" * 5000 + "}",
        '{"a": "\\u0068idden", "cut o',
        '{"a": "\\u0068idden", "deep": ' + "[" * 5000,
        '{"a": "hi\\ud83ddd\\udc00en\\udfff"}',
        '{"a": "hi\\ud83ddd\\udc00en\\udfff',
    ],
    ids=["json", "number", "cut off", "deep", "halves", "halves, cut off"],
)
def test_escapes_are_read_whatever_stands_around_them(text: str) -> None:
    found = list(strings_in(text))
    assert any("hidden" in one for one in found)
    assert "".join(found).encode()


@given(st.text(st.characters(exclude_categories=[])))
def test_what_is_checked_can_be_sent(text: str) -> None:
    [found] = strings_in(text.replace("\\", ""))
    assert found.encode("utf-16", "surrogatepass").decode("utf-16") == found
    assert found == text.replace("\\", "") or any(0xD800 <= ord(character) < 0xE000 for character in text)


def test_deeply_nested_strings_are_found() -> None:
    value: object = "deep"
    for _ in range(50_000):
        value = [value]
    assert list(strings_in(value)) == ["deep"]


@pytest.mark.parametrize("name", ["a name", "x" * 201, "é", "a\nb"])
def test_text_is_no_name(name: str) -> None:
    with pytest.raises(UpstreamUnavailable):
        checked_call_id(name)


def test_own_head_has_the_protocols_prefix() -> None:
    assert Head.own("cmpl-", "m").id.startswith("cmpl-")
