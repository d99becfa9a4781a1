"""Reading chat requests, and what of them is put before the classifier."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat import IGNORED_FIELDS, UNCHECKED_FIELDS, Chat, read_chat
from gateway.checks import prompt_items, response_items, windows
from services.contracts.errors import PromptTooLong, RequestError


def read(**fields: Any) -> Chat:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return read_chat(body, message_limit=10, prompt_limit=1000)


TEXT_FIELDS: dict[str, Any] = {
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"x": 1},
    "documents": [{"text": "hi"}],
    "prompt": "hi",
    "prompt_token_ids": [1, 2],
    "guided_regex": "a+",
    "prediction": {"type": "content", "content": "hi"},
    "logit_bias": {"50256": 100},
    "not_yet_invented": {"a": ["提示"]},
}


@pytest.mark.parametrize(
    ("name", "value"), [*TEXT_FIELDS.items(), *((name, value) for name in UNCHECKED_FIELDS for value in (True, 2))]
)
def test_field_that_would_go_unchecked_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}: not supported") as refusal:
        read(**{name: value})
    assert refusal.value.param == name


@pytest.mark.parametrize("name", [*TEXT_FIELDS, *UNCHECKED_FIELDS, *IGNORED_FIELDS])
@pytest.mark.parametrize("value", [None, "", [], {}])
def test_empty_field_is_left_out(name: str, value: Any) -> None:
    assert read(**{name: value}).content == read().content


def test_numbers_and_switches_go_upstream_and_bookkeeping_does_not() -> None:
    sent = {"mirostat": 2, "top_k": 0, "skip_special_tokens": False, "frequency_penalty": 0.5}
    chat = read(**sent, temperature=None, n=1, user="me", metadata={"a": "b"}, store=True)
    messages = [{"role": "user", "content": "hi"}]
    assert json.loads(chat.content) == {"model": "m", "messages": messages, "stream": False, **sent}


def test_of_the_stream_options_only_usage_goes_upstream() -> None:
    chat = read(stream=True, stream_options={"include_usage": True, "note": "say this"})
    assert json.loads(chat.content)["stream_options"] == {"include_usage": True}


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


def items(messages: list[tuple[str, str]], size: int = 100) -> list[dict[str, Any]]:
    chat = read(messages=[{"role": role, "content": content} for role, content in messages])
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
