"""Every protocol and every place in an answer where text can stand: nothing leaves without its check."""

import json
from importlib.metadata import version
from typing import Any

import httpx
import pytest

from tests.fakes.gateway_protocols import (
    CHAT,
    COMPLETIONS,
    TGI,
    TGI_ROOT,
    Speaker,
    by_name,
    openais,
    streamed_or_not,
)
from tests.fakes.gateway_stack import LEAK_CASES, Stack, by_sentence, events, wait_for, words
from tests.fakes.gateway_upstreams import BLAND, MARKER

REFUSAL = "I'm sorry, but I can't help with that."


# What is allowed


@by_name
def test_allowed_stream_says_what_the_model_said(stack: Stack, speaker: Speaker) -> None:
    stack.answer(words(60, sentence=7))
    response = speaker.ask(stack, stream=True)
    assert speaker.said(response) == stack.inference.text
    assert speaker.finish_reason(response) in ("stop", "eos_token")
    assert response.headers["x-fedward-decision"] == "allow"
    assert MARKER not in response.text, "fields that nobody knows are dropped"
    assert (events(response)[-1] == "[DONE]") is not speaker.name.startswith("tgi")


@by_name
def test_allowed_answer_says_what_the_model_said(stack: Stack, speaker: Speaker) -> None:
    response = speaker.ask(stack)
    assert speaker.text(response) == BLAND
    assert MARKER not in response.text, "fields that nobody knows are dropped"
    assert len(stack.safety.requests) == 2, "one check of the prompt, one of the answer"


def test_text_completion_is_openais_shape(stack: Stack) -> None:
    stack.answer(["One ", "two."], alternatives=["Some ", "three."])
    answer = COMPLETIONS.ask(stack, logprobs=2, echo=True, best_of=2).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "system_fingerprint": "ad" * 32,
        "choices": [
            {
                "index": 0,
                "text": "One two.",
                "finish_reason": "stop",
                "logprobs": {
                    "tokens": ["One ", "two."],
                    "token_logprobs": [-1.5, -1.5],
                    "top_logprobs": [{"One ": -1.5, "Some ": -1.5}, {"two.": -1.5, "three.": -1.5}],
                    "text_offset": [0, 1],
                },
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    assert stack.inference.requests == [
        {"model": "fake", "prompt": "Hello", "stream": False, "logprobs": 2, "echo": True, "best_of": 2}
    ]


def test_several_prompts_are_each_answered(stack: Stack) -> None:
    stack.answer(["One. "], others=[["Two. "]])
    response = COMPLETIONS.ask(stack, ["First question", "Second question"])
    assert [choice["text"] for choice in response.json()["choices"]] == ["One. ", "Two. "]
    answered = [item["prompt"] for item in stack.safety.requests[-1]["items"]]
    assert answered == ["First question", "Second question"], "each answer is judged with its own prompt"


def test_generation_is_tgis_shape(stack: Stack) -> None:
    stack.answer(["One ", "two."])
    token = {"id": 7, "logprob": -1.5, "special": False}
    tokens = [token | {"text": "One "}, token | {"text": "two."}]
    details = {"finish_reason": "eos_token", "generated_tokens": 2, "seed": None, "prefill": [], "tokens": tokens}
    body = {"generated_text": "One two.", "details": details}
    assert TGI.ask(stack).json() == body
    assert TGI_ROOT.ask(stack).json() == [body]
    assert TGI.ask(stack, details=False).json() == {"generated_text": "One two."}
    assert stack.inference.requests[0] == {"inputs": "Hello", "parameters": {"details": True}}
    last = {
        "index": 3,
        "token": token | {"text": "</s>", "special": True},
        "generated_text": "One two.",
        "details": {"input_length": 3, "finish_reason": "eos_token", "generated_tokens": 2, "seed": None},
    }
    plain = {"generated_text": None, "details": None}
    assert events(TGI.ask(stack, stream=True)) == [
        {"index": 1, "token": tokens[0], **plain},
        {"index": 2, "token": tokens[1], **plain},
        last,
    ]


def test_generated_text_begins_with_the_prompt_where_that_is_asked_for(stack: Stack) -> None:
    assert events(TGI.ask(stack, stream=True, return_full_text=True))[-1]["generated_text"] == f"Hello{BLAND}"


def test_info_has_the_inference_services_numbers_under_our_own_names(stack: Stack) -> None:
    assert stack.client.get("/info").json() == {
        "model_id": "fake",
        "model_sha": "ad" * 20,
        "max_input_tokens": 511,
        "max_total_tokens": 512,
        "router": "fedward-gateway",
        "version": version("fedward"),
    }


CALLS = [("find", ['{"wh', 'ere": "here"}']), ("get", ["{}"])]


@streamed_or_not
def test_calls_leave_whole_and_last(stack: Stack, stream: bool) -> None:
    stack.answer(["Looking. "], calls=CALLS)
    response = CHAT.ask(stack, stream=stream)
    calls = [
        {"id": "call_0", "type": "function", "function": {"name": "find", "arguments": '{"where": "here"}'}},
        {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}},
    ]
    if stream:
        deltas = [part["choices"][0]["delta"] for part in events(response)[:-1]]
        assert deltas == [
            {"role": "assistant", "content": "Looking. "},
            {"tool_calls": [{"index": 0} | calls[0]]},
            {"tool_calls": [{"index": 1} | calls[1]]},
            {},
        ]
    else:
        message = response.json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Looking. ", "tool_calls": calls}
    assert CHAT.finish_reason(response) == "tool_calls"


@streamed_or_not
def test_reasoning_leaves_in_its_own_channel(stack: Stack, stream: bool) -> None:
    stack.answer(["It is so. ", "Really."], reasoning=["Let me think. ", "It could be ", "so."])
    response = CHAT.ask(stack, stream=stream)
    if stream:
        deltas = [part["choices"][0]["delta"] for part in events(response)[:-1]]
        assert deltas == [
            {"role": "assistant", "reasoning_content": "Let me think. "},
            {"reasoning_content": "It could be so."},
            {"content": "It is so. "},
            {"content": "Really."},
            {},
        ]
    else:
        message = response.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (
            "Let me think. It could be so.",
            "It is so. Really.",
        )


@openais
@streamed_or_not
def test_all_choices_leave(stack: Stack, speaker: Speaker, stream: bool) -> None:
    stack.answer(["One. ", "Or so. "], others=[["Two. "], ["Three. ", "Four. ", "Five"]], usage=True)
    response = speaker.ask(stack, stream=stream, n=3)
    read = speaker.said if stream else speaker.text
    assert [read(response, i) for i in range(3)] == ["One. Or so. ", "Two. ", "Three. Four. Five"]
    if not stream:
        assert len(stack.safety.requests) == 2, "the choices are checked in one call"


@streamed_or_not
def test_logprobs_leave_with_their_text(stack: Stack, stream: bool) -> None:
    stack.answer(["One ", "two. ", "Three"], alternatives=["Uno ", "dos. ", "Tres"])
    response = CHAT.ask(stack, stream=stream, logprobs=True, top_logprobs=2)
    choices = [part["choices"][0] for part in events(response)[:-1]] if stream else response.json()["choices"]
    told = [[token["token"] for token in c["logprobs"]["content"]] for c in choices if c["logprobs"]]
    assert told == ([["One ", "two. "], ["Three"]] if stream else [["One ", "two. ", "Three"]])
    first = next(c for c in choices if c["logprobs"])["logprobs"]["content"][0]
    assert [top["token"] for top in first["top_logprobs"]] == ["One ", "Uno "]
    assert first["bytes"] == list(b"One ")


# The marker in the answer


@by_name
@pytest.mark.parametrize("case", LEAK_CASES)
def test_marker_never_leaves_in_a_stream(stack: Stack, speaker: Speaker, case: str) -> None:
    stack.answer(LEAK_CASES[case], pause=lambda _: 0.0005)
    response = speaker.ask(stack, stream=True)
    assert MARKER not in response.text
    released = speaker.said(response)
    assert stack.inference.text.startswith(released)
    assert len(released) <= stack.inference.text.index(MARKER)
    assert speaker.finish_reason(response) == "content_filter"
    last = [part for part in events(response) if part != "[DONE]"][-1]
    assert last["fedward"]["error"]["code"] == "content_filter"
    if speaker.name.startswith("tgi"):
        assert last["generated_text"].startswith(released)
        assert MARKER not in last["generated_text"]


@by_name
def test_marker_never_leaves_in_a_whole_answer(stack: Stack, speaker: Speaker) -> None:
    stack.answer(words(60, 25))
    response = speaker.ask(stack)
    assert (response.status_code, response.headers["x-fedward-decision"]) == (200, "refuse")
    assert MARKER not in response.text
    assert speaker.text(response) == REFUSAL
    assert speaker.finish_reason(response) == "content_filter"


ESCAPED = json.dumps(MARKER).replace("x", "\\u0078")
PLACES: dict[str, tuple[Speaker, dict[str, Any]]] = {
    "name of a call": (CHAT, {"calls": [(MARKER, ["{}"])]}),
    "arguments of a call": (CHAT, {"calls": [("find", [f'{{"q": "{MARKER}"}}'])]}),
    "arguments in pieces": (CHAT, {"calls": [("find", ['{"q": "', MARKER[:5], MARKER[5:], '"}'])]}),
    "arguments, escaped": (CHAT, {"calls": [("find", [f'{{"q": {ESCAPED}}}'])]}),
    "second call": (CHAT, {"calls": [("find", ["{}"]), ("get", [f'"{MARKER}"'])]}),
    "older call": (CHAT, {"legacy_call": ("find", f'"{MARKER}"')}),
    "reasoning": (CHAT, {"reasoning": ["Well. ", f"The {MARKER}. "]}),
    "last word of the reasoning": (CHAT, {"reasoning": ["Well. ", "The ", MARKER]}),
    "reasoning in pieces": (CHAT, {"reasoning": ["Well. ", "The ", *MARKER]}),
    "alternative": (CHAT, {"alternatives": ["a", MARKER, "b"]}),
    "alternative in pieces": (CHAT, {"alternatives": [MARKER[:3], MARKER[3:6], MARKER[6:]]}),
    "last alternative": (CHAT, {"alternatives": ["a", "b", MARKER]}),
    "alternative of a text completion": (COMPLETIONS, {"alternatives": ["a", "b", MARKER]}),
    "alternative of a generation": (TGI, {"alternatives": ["a", MARKER[:5], MARKER[5:]]}),
}


@pytest.mark.parametrize("place", PLACES)
@streamed_or_not
def test_marker_never_leaves_from_any_place(stack: Stack, place: str, stream: bool) -> None:
    speaker, fields = PLACES[place]
    stack.answer(["One ", "two. ", "three"], **fields)
    response = speaker.ask(stack, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    assert ESCAPED.strip('"') not in response.text
    assert MARKER[5:] not in response.text
    assert speaker.finish_reason(response) == "content_filter"


@openais
@pytest.mark.parametrize("bad", [0, 1])
def test_violation_ends_only_its_choice_in_a_stream(stack: Stack, speaker: Speaker, bad: int) -> None:
    pieces = [words(30, sentence=6), words(30, sentence=6)]
    pieces[bad] = words(30, 15, sentence=6)
    stack.answer(pieces[0], others=[pieces[1]], pause=by_sentence(6), usage=True)
    response = speaker.ask(stack, stream=True, n=2)
    assert MARKER not in response.text
    assert speaker.said(response, 1 - bad) == "".join(pieces[1 - bad])
    assert speaker.said(response, bad) == "".join(pieces[bad][:12])
    ends = {
        choice["index"]: choice["finish_reason"]
        for part in events(response)[:-1]
        for choice in part["choices"]
        if choice["finish_reason"]
    }
    assert ends == {bad: "content_filter", 1 - bad: "stop"}
    assert events(response)[-1] == "[DONE]"


@openais
def test_violation_ends_only_its_choice_in_a_whole_answer(stack: Stack, speaker: Speaker) -> None:
    stack.answer(["Fine. "], others=[[f"The {MARKER}. "], ["Good. "]])
    response = speaker.ask(stack, n=3)
    assert [speaker.text(response, i) for i in range(3)] == ["Fine. ", REFUSAL, "Good. "]
    assert response.json()["fedward"]["choices"] == [1]
    assert response.headers["x-fedward-decision"] == "refuse"


@openais
def test_generation_stops_when_every_choice_is_blocked(stack: Stack, speaker: Speaker) -> None:
    bad = [f"The {MARKER}. ", "More. "]
    stack.answer(bad, others=[bad], pause=lambda i: 60 if i == 2 else 0)
    response = speaker.ask(stack, stream=True, n=2)
    assert [part["choices"][0]["finish_reason"] for part in events(response)[:-1]] == ["content_filter"] * 2
    wait_for(lambda: stack.inference.cancelled >= 1)


# The marker in the prompt


PROMPTS: dict[str, tuple[Speaker, dict[str, Any]]] = {
    "prompt": (COMPLETIONS, {"prompt": f"the {MARKER}"}),
    "second prompt": (COMPLETIONS, {"prompt": ["fine", f"the {MARKER}"]}),
    "suffix": (COMPLETIONS, {"suffix": f"the {MARKER}"}),
    "grammar": (TGI, {"grammar": {"type": "regex", "value": MARKER}}),
    "parameter of a server": (TGI_ROOT, {"not_yet_invented": [MARKER]}),
    "description of a tool": (CHAT, {"tools": [{"type": "function", "function": {"description": MARKER}}]}),
    "name of a field in a schema": (CHAT, {"response_format": {"json_schema": {"properties": {MARKER: {}}}}}),
    "guided choice": (CHAT, {"guided_choice": ["yes", MARKER]}),
    "result of a tool": (
        CHAT,
        {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "tool_call_id": "1", "content": MARKER}]},
    ),
}


@pytest.mark.parametrize("place", PROMPTS)
@streamed_or_not
def test_blocked_prompt_gets_the_refusal_and_stops_the_model(stack: Stack, place: str, stream: bool) -> None:
    speaker, fields = PROMPTS[place]
    stack.safety.hold_prompt_while = lambda: not stack.inference.requests  # so that the generation has begun
    stack.answer(words(60), pause=lambda _: 60)
    response = speaker.ask(stack, stream=stream, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["x-fedward-decision"] == "refuse"
    assert speaker.finish_reason(response) == "content_filter"
    assert REFUSAL in response.text
    wait_for(lambda: stack.inference.cancelled >= 1)
    assert stack.inference.finished == 0


# Errors, each in its protocol's shape


def error_of(speaker: Speaker, body: Any) -> tuple[str, str]:
    """The message and the kind of an error."""
    if speaker.name.startswith("tgi"):
        assert set(body) == {"error", "error_type"}
        return body["error"], body["error_type"]
    return body["error"]["message"], body["error"]["type"]


REFUSED: list[tuple[Speaker, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": [1, 2]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1, 2]]}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["fine", "?!"]}, "prompt"),
    (COMPLETIONS, {"prompt": ["fine"] * 101}, "prompt"),
    (COMPLETIONS, {"prompt": "x" * 32_001}, "prompt"),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (COMPLETIONS, {"n": 0}, "n"),
    (TGI, {"max_new_tokens": 0}, "parameters.max_new_tokens"),
    (TGI, {"stop": "x"}, "parameters.stop"),
]


@pytest.mark.parametrize(("speaker", "fields", "named"), REFUSED)
def test_request_that_cannot_be_served_is_refused_by_name(
    stack: Stack, speaker: Speaker, fields: dict[str, Any], named: str
) -> None:
    response = speaker.ask(stack, **fields)
    assert response.status_code == (422 if speaker is TGI else 400)
    message, kind = error_of(speaker, response.json())
    assert message.startswith(f"{named}: ")
    assert kind == ("validation" if speaker is TGI else "invalid_request_error")
    assert stack.inference.requests == []


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"inputs": 7}', b'{"inputs": "?!"}', b'{"inputs": "\\ud800 hi"}', b"{}"]
)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_malformed_generation_is_422(stack: Stack, path: str, body: bytes) -> None:
    response = stack.client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert error_of(TGI, response.json())[1] == "validation"


def test_adapter_that_is_not_allowed_is_refused(stack: Stack) -> None:
    response = TGI.ask(stack, adapter_id="secret")
    assert response.status_code == 422
    assert TGI.ask(stack, adapter_id="fake").status_code == 200
    assert "adapter_id" not in stack.inference.requests[0]["parameters"], "the served one needs no name"


@by_name
@streamed_or_not
def test_the_models_own_refusal_is_passed_on_after_a_check(stack: Stack, speaker: Speaker, stream: bool) -> None:
    named = "adapter_id" if speaker.name.startswith("tgi") else "model"
    response = speaker.ask(stack, stream=stream, **{named: "other"})
    assert response.status_code == 404
    assert error_of(speaker, response.json())[0] == "no model other"
    response = speaker.ask(stack, stream=stream, **{named: MARKER})
    assert response.status_code == 404
    assert error_of(speaker, response.json())[0] == "inference: answered HTTP 404"


@by_name
@streamed_or_not
@pytest.mark.parametrize("direction", ["prompt", "response"])
@pytest.mark.parametrize("fault", ["500", "hang", "garbage", "reset", "unscored", "too few"])
def test_classifier_fault_before_the_first_byte_is_503(
    stack: Stack, speaker: Speaker, fault: str, direction: str, stream: bool
) -> None:
    stack.answer(words(30, 25, sentence=6))
    stack.break_safety(fault, direction)
    hasty_with = "safety" if fault == "hang" else ""
    response = speaker.ask(stack, stream=stream, hasty_with=hasty_with)
    assert_failed(speaker, response, "safety")


@by_name
@streamed_or_not
@pytest.mark.parametrize("fault", ["500", "hang", "garbage", "schema", "reset"])
def test_model_fault_before_the_first_byte_is_503(stack: Stack, speaker: Speaker, fault: str, stream: bool) -> None:
    stack.answer(words(30, 25, sentence=6), fault=fault)
    hasty_with = "inference" if fault == "hang" else ""
    assert_failed(speaker, speaker.ask(stack, stream=stream, hasty_with=hasty_with), "inference")


def assert_failed(speaker: Speaker, response: httpx.Response, service: str) -> None:
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert MARKER not in response.text
    assert "word" not in response.text
    message, kind = error_of(speaker, response.json())
    assert message.startswith(f"{service}: ")
    assert kind == ("generation" if speaker.name.startswith("tgi") else "server_error")


@by_name
@pytest.mark.parametrize("fault", ["reset", "hang", "garbage", "end", "error event"])
def test_model_fault_after_the_first_byte_ends_with_an_error(stack: Stack, speaker: Speaker, fault: str) -> None:
    stack.answer([*words(24, sentence=6), MARKER], fault=fault, fault_at=24)
    response = speaker.ask(stack, stream=True)
    *parts, last = events(response)
    assert error_of(speaker, last)[0].startswith("inference: ")
    assert MARKER not in response.text
    assert "[DONE]" not in parts
    assert "finish_reason" not in response.text or '"finish_reason":null' in response.text


@by_name
@streamed_or_not
def test_client_that_leaves_stops_the_model(stack: Stack, speaker: Speaker, stream: bool) -> None:
    stack.answer([BLAND] * 2, pause=lambda i: 60 * i)
    path = speaker.stream_path if stream else speaker.path
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{stack.url}{path}", json=speaker.body("Hello", stream=stream), timeout=0.5)
    wait_for(lambda: stack.inference.cancelled >= 1)
    assert stack.inference.finished == 0
