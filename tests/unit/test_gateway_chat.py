"""Reading chat requests, and what of them is put before the classifier."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat import UNCHECKED_FIELDS, Chat, read_chat
from gateway.checks import prompt_items, response_items, windows
from services.contracts.errors import PromptTooLong, RequestError


def read(**fields: Any) -> Chat:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return read_chat(body, message_limit=10, prompt_limit=1000)


@pytest.mark.parametrize("name", UNCHECKED_FIELDS)
def test_field_that_would_go_unchecked_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=name) as refusal:
        read(**{name: "text"})
    assert refusal.value.param == name
    assert read(**{name: None}).content == read(**{name: None}).content
    read(**{name: False})


def test_nulls_are_left_out_and_unknown_fields_go_on() -> None:
    assert read(temperature=None, n=1, mirostat=2).content == (
        b'{"model":"m","messages":[{"role":"user","content":"hi"}],"mirostat":2,"stream":false}'
    )


def test_message_replayed_from_an_answer_is_accepted() -> None:
    replayed: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    chat = read(messages=[{"role": "user", "content": "hi"}, replayed, {"role": "user", "content": "on"}])
    assert b"refusal" not in chat.content
    assert chat.prompt == "on"


def test_text_parts_are_joined_into_the_text_that_is_checked_and_sent() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = read(messages=[{"role": "user", "content": parts}])
    assert chat.prompt == "one\ntwo"
    assert b'"content":"one\\ntwo"' in chat.content


def test_limit_counts_all_text() -> None:
    read(messages=[{"role": "user", "content": "x" * 500}, {"role": "user", "content": "x" * 500}])
    with pytest.raises(PromptTooLong, match="1001 characters"):
        read(messages=[{"role": "user", "content": "x" * 500}, {"role": "user", "content": "x" * 501}])
    with pytest.raises(PromptTooLong):
        read(other={"note": "y " * 600})


def items(messages: list[tuple[str, str]], size: int = 100, **fields: Any) -> list[dict[str, Any]]:
    chat = read(messages=[{"role": role, "content": content} for role, content in messages], **fields)
    return [item.model_dump(exclude_none=True) for item in prompt_items(chat, size)]


def test_every_message_is_checked_and_an_assistant_turn_as_an_answer() -> None:
    conversation = [("system", "be kind"), ("user", "first"), ("assistant", "answer"), ("user", "second")]
    assert items(conversation) == [
        {"prompt": "be kind"},
        {"prompt": "first"},
        {"prompt": "first", "response": "answer"},
        {"prompt": "second"},
        {"prompt": "be kind\nfirst\nsecond"},
    ]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "hi")], [{"prompt": "hi"}]),
        ([("assistant", "hello"), ("user", "hi")], [{"prompt": "hello"}, {"prompt": "hi"}, {"prompt": "hello\nhi"}]),
        ([("user", "hi"), ("user", "?!")], [{"prompt": "hi"}, {"prompt": "hi\n?!"}]),
        ([("user", "hi"), ("assistant", "?!")], [{"prompt": "hi"}, {"prompt": "hi\n?!"}]),
        ([("user", "hi"), ("assistant", "")], [{"prompt": "hi"}]),
    ],
)
def test_text_without_a_verdict_of_its_own_is_judged_with_the_rest(
    messages: list[tuple[str, str]], expected: list[dict[str, Any]]
) -> None:
    assert items(messages) == expected


def test_prose_in_unknown_fields_is_judged() -> None:
    assert items([("user", "hi")], note=["some prose", "id-7"]) == [{"prompt": "hi"}, {"prompt": "hi\nsome prose"}]


def test_answer_is_judged_with_the_last_words_that_were_put() -> None:
    chat = read(messages=[{"role": "user", "content": text} for text in ("first", "second", "?!")])
    assert [item.prompt for item in response_items(chat, "answer", 100)] == ["second"]


def test_white_space_is_nothing_to_check() -> None:
    assert response_items(read(), " \n", 100) == []


@given(st.text(min_size=1), st.integers(8, 40), st.data())
def test_windows_show_every_short_passage_whole(text: str, size: int, data: st.DataObject) -> None:
    cut = windows(text, size)
    assert all(len(window) <= size for window in cut)
    start = data.draw(st.integers(0, len(text) - 1))
    passage = text[start : start + size // 4]
    assert not text.strip() or any(passage in window for window in cut)
