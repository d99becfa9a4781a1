"""What counts as leaked: characters of the marker and after it, wherever and in whatever pieces they come."""

import json

import pytest

from gateway.bench.client import Answer, Target
from gateway.bench.leak import ANSWERS, SAFE, UNSAFE
from gateway.bench.mock_answers import events, whole
from gateway.bench.script import MARKER, Script

BEFORE = len("".join(f"word{i} " for i in range(25)))


def answer(raw: bytes, status: int = 200) -> Answer:
    return Answer(status, raw, seconds=1.0, first_byte_seconds=None, end="complete")


def cut(script: Script, pieces: int) -> bytes:
    """The role and the first pieces of a streamed answer."""
    return b"".join(list(events(script))[: pieces + 1])


@pytest.mark.parametrize("name", ANSWERS)
def test_whole_unsafe_answer_has_leaked_all_from_the_marker_on(name: str) -> None:
    script = ANSWERS[name]
    text = script.text()
    streamed = answer(b"".join(events(script)))
    assert streamed.text == text
    assert streamed.leaked(script) == len(text) - text.index(MARKER)


@pytest.mark.parametrize(("pieces", "leaked"), [(0, 0), (25, 0), (26, len(MARKER) + 1), (27, len(MARKER) + 8)])
def test_stream_that_stops_has_leaked_what_came_from_the_marker_on(pieces: int, leaked: int) -> None:
    assert answer(cut(UNSAFE, pieces)).leaked(UNSAFE) == leaked


def test_half_of_the_marker_counts() -> None:
    script = ANSWERS["stream_marker_in_two_pieces"]
    assert answer(cut(script, 26)).leaked(script) == len(MARKER) // 2


def test_marker_in_an_error_body_counts() -> None:
    refusal = answer(json.dumps({"error": {"message": "blocked", "checked": f"word {MARKER}"}}).encode(), status=446)
    assert refusal.leaked(UNSAFE) == len(MARKER)


def test_refusal_in_place_of_the_answer_leaks_nothing() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "I cannot say that."}, "finish_reason": "stop"}
    assert answer(json.dumps({"choices": [choice]}).encode()).leaked(UNSAFE) == 0


def test_after_an_unsafe_prompt_every_character_of_an_answer_is_leaked() -> None:
    assert answer(cut(SAFE, 3)).leaked(SAFE, prompt_is_unsafe=True) == len("word0 word1 word2 ")
    refusal = answer(json.dumps({"error": {"message": MARKER}}).encode(), status=400)
    assert refusal.leaked(SAFE, prompt_is_unsafe=True) == 0, "the prompt is the client's own text"


def test_text_before_the_marker_is_no_leak_in_a_whole_answer() -> None:
    safe_part = Script(words=25, sentences=False)
    assert len(safe_part.text()) == BEFORE
    assert answer(whole(safe_part)).leaked(UNSAFE) == 0


def test_request_has_the_fields_of_its_target_and_its_own() -> None:
    target = Target("http://127.0.0.1/", {}, {"guardrails": ["prompt"]})
    body = json.loads(target.body(stream=True, prompt="Hello"))
    assert body == {
        "model": "bench",
        "messages": [{"role": "user", "content": "Hello"}],
        "guardrails": ["prompt"],
        "stream": True,
    }
