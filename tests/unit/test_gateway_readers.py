"""Reading requests and answers of every protocol: whatever comes in, there is a request, or an error that says why."""

import json
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.answers import Head
from gateway.asked import Asked
from gateway.checks import prompt_items
from gateway.protocols import chat, completions, tgi
from gateway.settings import GatewaySettings
from services.contracts.errors import RequestError, UpstreamUnavailable

SETTINGS = GatewaySettings(served_model_name="m", prompt_limit_characters=2000)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES | st.just("hello")},
        optional={"name": VALUES, "tool_calls": VALUES, "reasoning": VALUES},
    ),
    max_size=3,
)
BODIES: list[tuple[ModuleType, dict[str, Any]]] = [
    (chat, {"messages": MESSAGES | VALUES}),
    (completions, {"prompt": st.text() | st.lists(st.text(), max_size=3) | VALUES, "n": VALUES}),
    (tgi, {"inputs": st.text() | VALUES, "parameters": st.dictionaries(st.text(max_size=9), VALUES, max_size=3)}),
]
by_wire = pytest.mark.parametrize(("wire", "fields"), BODIES, ids=["chat", "completions", "tgi"])


@by_wire
@settings(max_examples=50)
@given(st.data())
def test_every_string_of_a_request_is_checked_or_the_request_refused(
    wire: ModuleType, fields: dict[str, Any], data: st.DataObject
) -> None:
    body = data.draw(st.fixed_dictionaries(fields, optional={"tools": VALUES, "x": VALUES}))
    try:
        asked: Asked = wire.read(body, SETTINGS)
    except RequestError:
        return
    checked = "\n".join(item.model_dump_json() for item in prompt_items(asked, 10_000))
    for text in long_words(json.loads(asked.content)):
        assert json.dumps(text, ensure_ascii=False)[1:-1] in checked
    assert asked.prompt_of(asked.choices - 1)


def long_words(value: Any) -> list[str]:
    """Strings with at least three letters, which are none of the protocol's own words."""
    if isinstance(value, str):
        own = ("user", "assistant", "system", "tool", "content", "role", "messages", "hello")
        return [value] if sum(map(str.isalpha, value)) > 2 and value.isascii() and value not in own else []
    if isinstance(value, dict):
        fields = {name: item for name, item in value.items() if name not in ("model", "stop", "adapter_id")}
        return [word for item in fields.values() for word in long_words(item)]
    return [word for item in value for word in long_words(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("wire", [chat, completions, tgi], ids=["chat", "completions", "tgi"])
@settings(max_examples=50)
@given(body=VALUES | st.fixed_dictionaries({"choices": VALUES, "id": VALUES}) | st.text())
def test_answer_is_read_or_refused(wire: ModuleType, body: Any) -> None:
    for read in (wire.read_whole, wire.read_event):
        try:
            event = read(json.dumps(body), Head("1", 1, "m"))
        except (ValidationError, UpstreamUnavailable):
            continue
        assert not event.parts


@pytest.mark.parametrize("value", [2**31, 10**30, -1, 1e99, "many", [1]])
@pytest.mark.parametrize(
    ("wire", "body", "name"),
    [
        (chat, {"messages": [{"role": "user", "content": "hi"}]}, "max_tokens"),
        (chat, {"messages": [{"role": "user", "content": "hi"}]}, "max_completion_tokens"),
        (completions, {"prompt": "hi"}, "max_tokens"),
        (tgi, {"inputs": "hi"}, "max_new_tokens"),
    ],
)
def test_answer_of_no_possible_length_is_refused(wire: ModuleType, body: dict[str, Any], name: str, value: Any) -> None:
    """A number that no counter can hold would break the counters for everybody."""
    fields = {"parameters": {name: value}} if wire is tgi else {name: value}
    with pytest.raises(RequestError, match=name):
        wire.read(body | fields, SETTINGS)
