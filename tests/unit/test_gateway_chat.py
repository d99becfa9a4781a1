"""Reading chat requests, and what of them is put before the classifier."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.asked import Asked
from gateway.checks import prompt_items, response_items, windows
from gateway.protocols import chat, completions, tgi
from gateway.protocols.request_fields import CHOOSING_FIELDS, IGNORED_FIELDS, UNCHECKED_FIELDS
from gateway.settings import GatewaySettings
from services.contracts.errors import PromptTooLong, RequestError, UnknownModel

SETTINGS = GatewaySettings(served_model_name="m", allowed_models=("n",), message_limit=10, prompt_limit_characters=1000)


def read(**fields: Any) -> Asked:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return chat.read(body, SETTINGS)


def sent(**fields: Any) -> Any:
    return json.loads(read(**fields).content)


@pytest.mark.parametrize("name", UNCHECKED_FIELDS + CHOOSING_FIELDS)
def test_field_that_nothing_can_check_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: not supported") as refusal:
        read(**{name: [1]})
    assert refusal.value.param == name
    with pytest.raises(RequestError, match=f"^{name}: not supported"):
        completions.read({"prompt": "hi", name: "x"}, SETTINGS)
    with pytest.raises(RequestError, match=rf"^chat_template_kwargs\.{name}: not supported"):
        read(chat_template_kwargs={name: "x"})
    if name != "adapter_id":  # TGI's own name of the model
        with pytest.raises(RequestError, match=rf"^parameters\.{name}: not supported"):
            tgi.read({"inputs": "hi", "parameters": {name: "x"}}, SETTINGS)


@pytest.mark.parametrize("name", UNCHECKED_FIELDS + CHOOSING_FIELDS)
def test_field_that_asks_for_nothing_is_left_out(name: str) -> None:
    assert sent(**{name: []}) == sent()


@pytest.mark.parametrize("name", IGNORED_FIELDS)
def test_bookkeeping_is_left_out(name: str) -> None:
    assert sent(**{name: "x"}) == sent()


TEXT_FIELDS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "description": "a secret"}}],
    "tool_choice": {"type": "function", "function": {"name": "a secret"}},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a secret": {}}}}},
    "guided_regex": "a secret",
    "grammar": {"value": '{"enum": ["a\\u0020secret"]}'},
    "documents": [{"text": "a secret"}],
    "prediction": {"type": "content", "content": "a secret"},
    "suffix": "a secret",
    "not_yet_invented": {"a": [["提示", "a secret"]]},
}


@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_text_of_any_field_goes_upstream_and_is_checked(name: str) -> None:
    asked = read(**{name: TEXT_FIELDS[name]})
    assert json.loads(asked.content)[name] == TEXT_FIELDS[name]
    checked = [item.prompt or "" for item in prompt_items(asked, 1000)]
    assert sum("a secret" in text for text in checked) == 2, "by itself, and with the rest"
    assert asked.prompt_of(0) == "hi"


def test_words_of_the_protocol_are_no_text() -> None:
    assert len(prompt_items(read(tool_choice="auto", response_format={"type": "json_object"}), 1000)) == 1


def test_numbers_and_switches_go_upstream_as_they_are() -> None:
    options = {"mirostat": 2, "top_k": 0, "skip_special_tokens": False, "frequency_penalty": 0.5, "logprobs": True}
    messages = [{"role": "user", "content": "hi"}]
    assert sent(**options, temperature=None, n=3) == {
        "model": "m", "messages": messages, "stream": False, "n": 3, **options
    }  # fmt: skip
    assert read(n=3).choices == 3


def test_of_the_stream_options_only_usage_goes_upstream() -> None:
    options = {"include_usage": True, "note": "say this"}
    assert sent(stream=True, stream_options=options)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("name", "model"), [("m", "m"), ("n", "n"), ("tgi", "m"), ("dummy", "m"), (None, "m")])
def test_model_is_one_that_is_allowed(name: str | None, model: str) -> None:
    assert sent(model=name)["model"] == model


@pytest.mark.parametrize("name", ["o", "", "M"])
def test_other_models_are_unknown(name: str) -> None:
    with pytest.raises(UnknownModel):
        read(model=name)


CALLS = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"q": "s\\u0065cret"}'}}]


def test_calls_and_their_results_go_upstream_and_are_checked() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "reasoning": "thinking", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": "result"},
    ]
    asked = read(messages=messages)
    assert json.loads(asked.content)["messages"] == messages
    found = [item.model_dump(exclude_none=True) for item in prompt_items(asked, 1000)]
    assert found[1]["prompt"] == "hi"
    assert {"thinking", "find", "secret"} <= set(found[1]["response"].split("\n"))
    assert found[2] == {"prompt": "call_1\nresult"} or found[2] == {"prompt": "result\ncall_1"}
    assert asked.prompt_of(0) == "hi"


def test_message_replayed_from_an_answer_is_accepted() -> None:
    replayed: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    asked = read(messages=[{"role": "user", "content": "hi"}, replayed, {"role": "user", "content": "on"}])
    assert b"refusal" not in asked.content
    assert asked.prompt_of(0) == "on"


def test_text_parts_are_joined_into_the_text_that_is_checked_and_sent() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = read(messages=[{"role": "user", "content": parts}])
    assert asked.prompt_of(0) == "one\ntwo"
    assert b'"content":"one\\ntwo"' in asked.content


def test_limit_counts_all_text() -> None:
    read(messages=[{"role": "user", "content": "x" * 500}, {"role": "user", "content": "x" * 500}])
    with pytest.raises(PromptTooLong, match="1001 characters"):
        read(messages=[{"role": "user", "content": "x" * 500}, {"role": "user", "content": "x" * 501}])


def items(messages: list[tuple[str, str]], size: int = 100) -> list[dict[str, Any]]:
    asked = read(messages=[{"role": role, "content": content} for role, content in messages])
    return [item.model_dump(exclude_none=True) for item in prompt_items(asked, size)]


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
    asked = read(messages=[{"role": "user", "content": text} for text in ("first", "second", "?!")])
    assert [item.prompt for item in response_items(asked.prompt_of(0), ["answer"], 100)] == ["second"]


def test_white_space_is_nothing_to_check() -> None:
    assert response_items("hi", [" \n"], 100) == []


@given(st.text(min_size=1), st.integers(8, 40), st.data())
def test_windows_show_every_short_passage_whole(text: str, size: int, data: st.DataObject) -> None:
    cut = windows(text, size)
    assert all(len(window) <= size for window in cut)
    start = data.draw(st.integers(0, len(text) - 1))
    passage = text[start : start + size // 4]
    assert not text.strip() or any(passage in window for window in cut)
