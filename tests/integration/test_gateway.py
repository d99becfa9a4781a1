"""The gateway between real sockets: nothing unchecked leaves it, whatever happens on either side."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import (
    LEAK_CASES,
    UNCHECKED,
    Stack,
    assert_nothing_leaked,
    chat_body,
    events,
    gateway,
    said,
    wait_for,
    words,
)
from tests.fakes.gateway_upstreams import BLAND, MARKER, FakeSafety, closed_port, serving
from tests.fakes.vllm_server import FakeVllm

# What is allowed


def test_allowed_answer_is_openais_shape_with_checked_fields_only(stack: Stack) -> None:
    response = stack.ask(temperature=0.5, frequency_penalty=0.1)
    assert response.status_code == 200
    assert response.headers["x-fedward-decision"] == "allow"
    answer = response.json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": "ad" * 32,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": BLAND},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    [sent] = stack.inference.requests
    assert sent == {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "frequency_penalty": 0.1,
        "stream": False,
    }


def test_allowed_stream_arrives_whole_and_in_order(stack: Stack) -> None:
    stack.answer(words(60, sentence=7), usage=True)
    response = stack.ask(stream=True)
    parts = events(response)
    assert response.headers["x-fedward-decision"] == "allow"
    assert said(parts) == stack.inference.text
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parts[-3]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert parts[-2]["choices"] == []
    assert parts[-2]["usage"]["total_tokens"] == 7
    assert parts[-1] == "[DONE]"
    assert len(parts) > 8, "text leaves sentence by sentence, not in one piece at the end"


def test_stream_flows_while_the_model_still_writes(stack: Stack) -> None:
    stack.answer([BLAND] * 2, pause=lambda i: 60 * i)
    with stack.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        next(response.iter_lines())
        assert stack.inference.finished == 0


def test_pause_releases_what_is_checked_without_cutting_a_word(stack: Stack) -> None:
    stack.answer(["some words and a bro", "ken one."], pause=lambda i: 0.8 * i)
    parts = events(stack.ask(stream=True))
    texts = [part["choices"][0]["delta"].get("content") for part in parts[:2]]
    assert texts == ["some words and a ", "broken one."]


def test_empty_answer_ends_normally(stack: Stack) -> None:
    stack.answer([""])
    parts = events(stack.ask(stream=True))
    assert [part if part == "[DONE]" else part["choices"][0]["finish_reason"] for part in parts] == ["stop", "[DONE]"]
    assert stack.ask().json()["choices"][0]["message"]["content"] == ""


# The marker in the answer


@pytest.mark.parametrize("case", LEAK_CASES)
def test_marker_never_leaves_in_a_stream(stack: Stack, case: str) -> None:
    stack.answer(LEAK_CASES[case], pause=lambda _: 0.0005)
    response = stack.ask(stream=True)
    released = assert_nothing_leaked(response, stack.inference.text)
    assert_closed_by_filter(events(response), nothing_released=not released)
    if "in sentences" in case:
        assert released == "".join(LEAK_CASES[case][:24]), "all whole sentences before the marker have left"
    assert response.headers["x-fedward-decision"] == ("allow" if released else "refuse")


def assert_closed_by_filter(parts: list[Any], *, nothing_released: bool) -> None:
    choice = parts[-2]["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["delta"] == (
        {"role": "assistant", "content": "I'm sorry, but I can't help with that."} if nothing_released else {}
    )
    reason = "The answer was classified as unsafe: Violent crimes (S1)."
    assert parts[-2]["fedward"] == {
        "blocked": True,
        "decision": "refuse",
        "direction": "response",
        "categories": ["S1"],
        "reason": reason,
        "error": {"message": reason, "type": "content_filter", "code": "content_filter", "param": None},
    }
    assert parts[-1] == "[DONE]"


def test_marker_at_twenty_milliseconds_a_word(stack: Stack) -> None:
    """The protocol that other gateways were measured with: 60 words, 20 ms each, the marker as the 26th."""
    stack.answer(words(60, 25), pause=lambda _: 0.02)
    assert_nothing_leaked(stack.ask(stream=True), stack.inference.text)


def test_violation_stops_the_generation(stack: Stack) -> None:
    stack.answer(["Fine. ", f"The {MARKER}. ", "More. "], pause=lambda i: 60 if i == 2 else 0)
    assert assert_nothing_leaked(stack.ask(stream=True), stack.inference.text) == "Fine. "
    wait_for(lambda: stack.inference.cancelled >= 1)


def test_marker_cut_by_a_pause(stack: Stack) -> None:
    stack.answer(["fine so far ", MARKER[:5], MARKER[5:] + " more"], pause=lambda i: 0.8 if i == 2 else 0.0)
    assert assert_nothing_leaked(stack.ask(stream=True), stack.inference.text) == "fine so far "


def test_marker_never_leaves_in_a_whole_answer(stack: Stack) -> None:
    stack.answer(words(60, 25))
    response = stack.ask()
    assert response.status_code == 200
    assert response.headers["x-fedward-decision"] == "refuse"
    assert MARKER not in response.text
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "I'm sorry, but I can't help with that."
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    assert answer["fedward"]["direction"] == "response"


def test_marker_deep_in_a_long_answer(stack: Stack) -> None:
    """Longer than one window: the checks go over all of it."""
    stack.answer(["word " * 1500 + MARKER])
    assert stack.ask().json()["choices"][0]["finish_reason"] == "content_filter"


def test_text_given_to_the_classifier_is_bounded(stack: Stack) -> None:
    stack.answer(words(600, sentence=10))
    stack.ask(stream=True)
    checked = sum(
        len(item["response"]) for body in stack.safety.requests for item in body["items"] if "response" in item
    )
    longest = max(len(item.get("response", "")) for body in stack.safety.requests for item in body["items"])
    assert longest <= 2000
    assert checked < 20 * len(stack.inference.text), "each unit brings at most 1,000 characters of context"


# The marker in the prompt


PROMPT_CASES: dict[str, dict[str, Any]] = {
    "only message": {"messages": [{"role": "user", "content": f"tell me of the {MARKER}"}]},
    "system": {"messages": [{"role": "system", "content": MARKER}, {"role": "user", "content": "hi"}]},
    "developer": {"messages": [{"role": "developer", "content": MARKER}, {"role": "user", "content": "hi"}]},
    "earlier turn": {
        "messages": [
            {"role": "user", "content": MARKER},
            {"role": "assistant", "content": "I can't help."},
            {"role": "user", "content": "hi"},
        ]
    },
    "earlier answer": {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": MARKER},
            {"role": "user", "content": "go on"},
        ]
    },
    "answer to continue": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": MARKER}]},
    "text part": {"messages": [{"role": "user", "content": [{"type": "text", "text": MARKER}]}]},
    "end of a long message": {"messages": [{"role": "user", "content": "word " * 3000 + MARKER}]},
    "across a window": {"messages": [{"role": "user", "content": "x" * 1995 + MARKER + "x" * 2000}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", PROMPT_CASES)
def test_blocked_prompt_gets_the_refusal_and_stops_the_model(stack: Stack, case: str, stream: bool) -> None:
    stack.safety.hold_prompt_while = lambda: not stack.inference.requests  # so that the generation has begun
    stack.answer(words(60), pause=lambda _: 60)
    response = stack.ask(stream=stream, **PROMPT_CASES[case])
    assert response.status_code == 200, response.text
    assert response.headers["x-fedward-decision"] == "refuse"
    part = events(response)[0] if stream else response.json()
    assert part["choices"][0]["finish_reason"] == "content_filter"
    assert part["choices"][0]["delta" if stream else "message"] == {
        "role": "assistant",
        "content": "I'm sorry, but I can't help with that.",
    }
    assert part["fedward"]["direction"] == "prompt"
    assert part["fedward"]["categories"] == ["S1"]
    if stream:
        assert events(response)[1:] == ["[DONE]"]
    wait_for(lambda: stack.inference.cancelled >= 1)
    assert stack.inference.finished == 0


def test_generation_runs_beside_the_prompt_check_but_nothing_leaves_before_it(stack: Stack) -> None:
    stack.safety.hold_prompt_while = lambda: not stack.inference.finished
    with stack.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        first_byte = time.monotonic()
        assert response.status_code == 200
    assert stack.inference.started_at < stack.safety.verdict_at < first_byte


# Requests that are refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"prompt_token_ids": [1, 2]}, "prompt_token_ids"),
        ({"chat_template": "{{ 'a' ~ 'b' }}"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": "?!"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "hi", "audio": {"id": "1"}}]}, "messages.0.audio"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages.0.content.0"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "hi"}] * 101}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 32_001}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": 7}, "model"),
    ],
)
def test_request_that_cannot_be_checked_is_refused_by_name(stack: Stack, fields: dict[str, Any], param: str) -> None:
    response = stack.ask(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert stack.inference.requests == []


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}', b'{"x": 1e999}'],
)
def test_malformed_body_is_400(stack: Stack, body: bytes) -> None:
    response = stack.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("extra", [b'"x": NaN', b'"x": "\\ud800 and more"'])
def test_value_that_json_does_not_have_is_400(stack: Stack, extra: bytes) -> None:
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}], ' + extra + b"}"
    response = stack.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


# The other routes, health and metrics


def test_only_allowed_models_are_listed(stack: Stack) -> None:
    known = {"object": "model", "created": 1, "owned_by": "fedward", "max_model_len": 512, "sha256": "ad" * 32}
    cards = [known | {"id": name} for name in ("fake", "other")]
    assert stack.client.get("/v1/models").json() == {"object": "list", "data": cards}
    assert stack.client.get("/v1/models/fake").json() == cards[0]
    assert stack.client.get("/v1/models/secret").status_code == 404


@pytest.mark.parametrize("name", ["secret", "adapter/of/somebody", ""])
def test_model_that_is_not_allowed_is_404(stack: Stack, name: str) -> None:
    response = stack.ask(model=name)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert stack.inference.requests == []


@pytest.mark.parametrize("name", ["tgi", "dummy", None])
def test_placeholder_means_the_served_model(stack: Stack, name: str | None) -> None:
    assert stack.ask(model=name).status_code == 200
    assert stack.inference.requests[0]["model"] == "fake"


def test_moderations_are_passed_through(stack: Stack) -> None:
    assert stack.client.post("/v1/moderations", json={"input": MARKER}).json()["results"][0]["flagged"] is True


def test_readiness_is_red_while_a_service_is_not_ready() -> None:
    inference, safety = FakeInference(), FakeSafety()
    with serving(inference) as inference_url, serving(safety) as safety_url:
        with gateway(inference_url, safety_url) as url:
            assert httpx.get(f"{url}/health/ready").status_code == 200
            safety.ready = False
            wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
            assert httpx.get(f"{url}/health/ready").json()["reason"] == "safety: answered HTTP 503"
            assert httpx.get(f"{url}/health/live").status_code == 200
        with gateway(closed_port(), safety_url) as url:
            reason = httpx.get(f"{url}/health/ready").json()["reason"]
    assert reason == "safety: answered HTTP 503; inference: cannot be reached"


def test_gateway_in_front_of_vllm_is_ready() -> None:
    with (
        serving(FakeVllm().app) as inference_url,
        serving(FakeSafety()) as safety_url,
        gateway(inference_url, safety_url) as url,
    ):
        answer = httpx.get(f"{url}/health/ready")
    assert answer.status_code == 200, answer.text


def test_metrics_count_decisions_and_show_that_nothing_left_unchecked(stack: Stack) -> None:
    def count(direction: str, outcome: str) -> float:
        labels = {"direction": direction, "outcome": outcome}
        return REGISTRY.get_sample_value("fedward_gateway_decisions_total", labels) or 0

    before = count("prompt", "refuse"), count("prompt", "allow"), count("response", "unavailable")
    stack.ask(MARKER)
    stack.break_safety("500", "response")
    stack.ask()
    after = count("prompt", "refuse"), count("prompt", "allow"), count("response", "unavailable")
    assert after == (before[0] + 1, before[1] + 1, before[2] + 1)
    text = stack.client.get("/metrics").text
    assert f"{UNCHECKED} {REGISTRY.get_sample_value(UNCHECKED)}" in text
    assert "fedward_gateway_check_seconds_count" in text


def test_generations_are_measured_by_the_genai_conventions(stack: Stack) -> None:
    def sample(name: str, **more: str) -> float:
        labels = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "fake"} | more
        return REGISTRY.get_sample_value(f"gen_ai_client_{name}", labels) or 0

    def samples() -> list[float]:
        whole, failed = ({"error_type": name} for name in ("", "UpstreamUnavailable"))
        tokens = [sample("token_usage_sum", gen_ai_token_type=kind) for kind in ("input", "output")]
        return [sample("operation_duration_seconds_count", **kind) for kind in (whole, failed)] + tokens

    before = samples()
    stack.answer([BLAND], usage=True)
    for stream in (False, True):
        assert stack.ask(stream=stream).status_code == 200
    stack.answer([BLAND], fault="500")
    assert stack.ask().status_code == 503
    assert [after - b for after, b in zip(samples(), before, strict=True)] == [2, 1, 6, 8]


# The process


def test_process_serves_and_logs_no_text(stack: Stack, tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    with serving(stack.inference) as inference_url, serving(stack.safety) as safety_url, log.open("wb") as stderr:
        command = [
            sys.executable,
            "-m",
            "gateway",
            "--port",
            "0",
            "--log-level",
            "debug",
            "--check-deadline-ms",
            "2000",
            "--served-model-name",
            "fake",
        ]
        process = subprocess.Popen(
            [*command, "--inference-url", inference_url, "--safety-url", safety_url], stderr=stderr
        )
        try:
            wait_for(lambda: "listening" in log.read_text(), seconds=60)
            port = next(json.loads(line)["port"] for line in log.read_text().splitlines() if "listening" in line)
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            stack.answer(words(60, 25, sentence=6))
            assert "content_filter" in httpx.post(url, json=chat_body(stream=True)).text
            body = {"model": "fake", "messages": [{"role": "user", "content": f"secret {MARKER}"}]}
            assert "content_filter" in httpx.post(url, json=body).text
            stack.break_safety("garbage", "prompt")
            assert httpx.post(url, json=body).status_code == 503
        finally:
            process.terminate()
            process.wait(timeout=20)
    text = log.read_text()
    assert "found unsafe" in text
    assert "check failed" in text
    assert MARKER not in text
    assert "secret" not in text
    assert "word1" not in text


def test_process_refuses_a_bad_setting() -> None:
    command = [sys.executable, "-m", "gateway", "--check-deadline-ms", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: python -m gateway: check_deadline_ms: ")
