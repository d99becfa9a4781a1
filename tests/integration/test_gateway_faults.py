"""The gateway when a service fails or the client goes away: an error with nothing unchecked before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from tests.fakes.gateway_stack import (
    PATIENT,
    Stack,
    assert_ended_by_error,
    assert_nothing_leaked,
    assert_unavailable,
    by_sentence,
    chat_body,
    events,
    gateway,
    said,
    wait_for,
    words,
)
from tests.fakes.gateway_upstreams import BLAND, MARKER, Fake, closed_port, raw_server, serving
from tests.meta.test_import_layers import ROOT

# The table


def published_table() -> dict[str, dict[str, str]]:
    """What the document promises: by column, what comes of each fault."""
    section = (ROOT / "docs/gateway.md").read_text().split("## Failures\n")[1]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: {row[0]: row[i] for row in rows if row[i]} for i, name in enumerate(head) if i}


TABLE = published_table()
DEMANDED = {"down", "500", "hang", "drip", "garbage", "schema", "reset"}


def faults(column: str, outcome: str) -> list[str]:
    return [fault for fault, promised in TABLE[column].items() if promised == outcome and fault != "down"]


def test_table_has_every_fault_that_has_to_be_handled() -> None:
    assert set(TABLE["classifier, at first"]) >= DEMANDED
    assert set(TABLE["model, at first"]) >= DEMANDED
    assert {outcome for column in TABLE.values() for outcome in column.values()} == {"503", "error event", "passed on"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("direction", ["prompt", "response"])
@pytest.mark.parametrize("fault", faults("classifier, at first", "503"))
def test_classifier_fault_before_the_first_byte_is_503(stack: Stack, fault: str, direction: str, stream: bool) -> None:
    stack.answer(words(60, 25, sentence=6))
    stack.break_safety(fault, direction)
    assert_unavailable(stack.ask(stream=stream, hasty_with="safety" if fault in ("hang", "drip") else ""), "safety")


@pytest.mark.parametrize(
    ("where", "released"), [({"text": "word6"}, 6), ({"after": 4}, 12)], ids=["mid-stream", "whole-answer check"]
)
@pytest.mark.parametrize("fault", faults("classifier, in a stream", "error event"))
def test_classifier_fault_after_the_first_byte_ends_with_an_error(
    stack: Stack, fault: str, where: dict[str, Any], released: int
) -> None:
    stack.answer(words(12, sentence=3), pause=by_sentence(3))  # four sentences: four checks, and one of the whole
    stack.break_safety(fault, "response", **where)
    parts = events(stack.ask(stream=True))
    assert said(parts) == "".join(stack.inference.pieces[:released])
    assert_ended_by_error(parts, "safety")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", faults("model, at first", "503"))
def test_model_fault_before_the_first_byte_is_503(stack: Stack, fault: str, stream: bool) -> None:
    stack.answer(words(60, 25, sentence=6), fault=fault)
    hasty_with = "inference" if fault in ("hang", "drip") else ""
    assert_unavailable(stack.ask(stream=stream, hasty_with=hasty_with), "inference")


@pytest.mark.parametrize("fault", faults("model, in a stream", "error event"))
def test_model_fault_after_the_first_byte_ends_with_an_error(stack: Stack, fault: str) -> None:
    stack.answer([*words(24, sentence=6), MARKER], fault=fault, fault_at=24)
    response = stack.ask(stream=True)
    assert assert_nothing_leaked(response, stack.inference.text) == "".join(stack.inference.pieces[:24])
    assert_ended_by_error(events(response), "inference")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("service", ["safety", "inference"])
def test_service_that_is_down_is_503(stack: Stack, service: str, stream: bool) -> None:
    with serving(stack.inference) as inference_url, serving(stack.safety) as safety_url:
        urls = {"inference": inference_url, "safety": safety_url, service: closed_port()}
        with gateway(urls["inference"], urls["safety"]) as url:
            response = httpx.post(f"{url}/v1/chat/completions", json=chat_body(stream=stream))
    assert_unavailable(response, service)


# More of the same


def test_slow_classifier_within_its_deadline_only_delays(stack: Stack) -> None:
    stack.safety.delay = 0.1
    stack.answer(words(30, sentence=6))
    assert said(events(stack.ask(stream=True))) == stack.inference.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer",
    [b"", f"{MARKER} is not HTTP\r\n\r\n".encode(), b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nword" * 9],
    ids=["nothing", "not HTTP", "not gzip"],
)
def test_model_that_speaks_no_http_is_503(stack: Stack, answer: bytes, stream: bool) -> None:
    with (
        raw_server(answer) as inference_url,
        serving(stack.safety) as safety_url,
        gateway(inference_url, safety_url) as url,
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=chat_body(stream=stream))
    assert_unavailable(response, "inference")


@pytest.mark.parametrize("stream", [False, True])
def test_the_models_own_refusal_of_a_request_is_passed_on(stack: Stack, stream: bool) -> None:
    response = stack.ask(model="other", stream=stream)
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "no model other",
            "type": "invalid_request_error",
            "code": "model_not_found",
            "param": "model",
        }
    }
    blocked = stack.ask(MARKER, model="other", stream=stream)
    assert blocked.status_code == 200, "the prompt's verdict comes first"


@pytest.mark.parametrize("stream", [False, True])
def test_words_of_the_models_refusal_are_checked_too(stack: Stack, stream: bool) -> None:
    response = stack.ask(model=MARKER, stream=stream)  # the fake's error message names the model
    assert response.status_code == 404
    assert MARKER not in response.text
    assert response.json()["error"]["message"] == "inference: answered HTTP 404"
    stack.break_safety("500", "response")
    assert_unavailable(stack.ask(model="other", stream=stream), "safety")


def test_more_held_text_than_the_limit_closes_the_answer(stack: Stack) -> None:
    stack.safety.hold_prompt_while = lambda: stack.inference.finished + stack.inference.cancelled == 0
    stack.answer([BLAND * 10] * 30)
    parts = events(stack.ask(stream=True))
    assert_ended_by_error(parts, "safety")
    assert "3000 characters" in parts[-1]["error"]["message"]
    assert len(said(parts)) <= 3000


def test_more_requests_than_places_are_refused_until_one_is_free(stack: Stack) -> None:
    stack.answer([BLAND] * 2, pause=lambda i: 60 * i)
    limits = {"requests_in_flight": 1, "check_deadline_ms": 5000, "silence_seconds": 60, "generation_seconds": 60}
    with (
        serving(stack.inference) as inference_url,
        serving(stack.safety) as safety_url,
        gateway(inference_url, safety_url, limits) as url,
    ):

        def ask(stream: bool) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json=chat_body(stream=stream))

        with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat_body(stream=True)) as response:
            lines = response.iter_lines()  # kept: httpx closes the connection when its iterator goes
            next(lines)
            for refused in (ask(False), ask(True)):
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "overloaded"
        wait_for(lambda: stack.inference.cancelled >= 1)
        stack.answer([BLAND], pause=lambda _: 0)
        wait_for(lambda: ask(False).status_code == 200)


# A service that keeps failing


@contextmanager
def with_breaker(stack: Stack, seconds: float, failures: int = 2) -> Iterator[httpx.Client]:
    limits = PATIENT | {"breaker_failures": failures, "breaker_seconds": seconds}
    with (
        serving(stack.inference) as inference_url,
        serving(stack.safety) as safety_url,
        gateway(inference_url, safety_url, limits) as url,
        httpx.Client(base_url=url, timeout=20) as client,
    ):
        yield client


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=chat_body(**fields))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("service", ["safety", "inference"])
def test_service_that_keeps_failing_is_not_called(stack: Stack, service: str, stream: bool) -> None:
    fake: Fake = getattr(stack, service)
    fake.fault = "500"
    stack.answer([BLAND], pause=lambda _: 5)  # no check of it, which the fake would answer, comes between the failures
    with with_breaker(stack, seconds=600) as client:
        assert client.get("/health/ready").status_code == 200
        assert "answered HTTP 500" in ask(client, stream=stream).json()["error"]["message"]
        wait_for(lambda: "left alone" in ask(client, stream=stream).text)
        fake.fault, fake.requests[:] = None, []
        response = ask(client, stream=stream)
        assert_unavailable(response, service)
        assert "left alone for a moment after " in response.json()["error"]["message"]
        assert fake.requests == []
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/ready").json()["reason"].startswith(f"{service}: left alone")
        assert REGISTRY.get_sample_value("fedward_gateway_breaker_open", {"upstream": service}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("service", ["safety", "inference"])
def test_service_that_answers_a_trial_call_is_called_again(stack: Stack, service: str, stream: bool) -> None:
    fake: Fake = getattr(stack, service)
    fake.fault = "500"
    with with_breaker(stack, seconds=0.2) as client:
        wait_for(lambda: "left alone" in ask(client, stream=stream).text)
        fake.fault = None
        wait_for(lambda: ask(client, stream=stream).status_code == 200)
        assert ask(client).status_code == 200
        assert REGISTRY.get_sample_value("fedward_gateway_breaker_open", {"upstream": service}) == 0


def test_neither_a_client_that_leaves_nor_a_refused_request_is_a_failure(stack: Stack) -> None:
    stack.answer([BLAND], pause=lambda _: 60)
    with with_breaker(stack, seconds=600, failures=1) as client:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.base_url}/v1/chat/completions", json=chat_body(), timeout=0.5)
        wait_for(lambda: stack.inference.cancelled >= 1)
        assert ask(client, model="other").status_code == 404
        stack.answer([BLAND], pause=lambda _: 0)
        assert ask(client).status_code == 200


# The client goes away


def test_client_that_leaves_a_stream_stops_the_model(stack: Stack) -> None:
    before = REGISTRY.get_sample_value("fedward_gateway_upstream_cancellations_total") or 0
    stack.answer([BLAND] * 2, pause=lambda i: 60 * i)
    with stack.client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        next(response.iter_lines())
    wait_for(lambda: stack.inference.cancelled >= 1)
    assert stack.inference.finished == 0
    assert (REGISTRY.get_sample_value("fedward_gateway_upstream_cancellations_total") or 0) > before


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_before_the_first_byte_stops_the_model(stack: Stack, stream: bool) -> None:
    stack.answer([BLAND], pause=lambda _: 60)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{stack.url}/v1/chat/completions", json=chat_body(stream=stream), timeout=0.5)
    wait_for(lambda: stack.inference.cancelled >= 1)
