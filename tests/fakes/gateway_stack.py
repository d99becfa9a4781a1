"""The gateway between two fake services, on real sockets, and what its tests have in common."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from gateway.app import build_app
from gateway.settings import GatewaySettings
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_upstreams import MARKER, FakeSafety, serving

UNCHECKED = "fedward_gateway_characters_released_before_verdict_total"
# A loaded machine must not make a test fail, so most tests ask a gateway that waits longer than they need; tests of
# the waiting itself ask one that waits less for the service which they let hang.
PATIENT: dict[str, Any] = {
    "check_deadline_ms": 1500,
    "silence_seconds": 1.5,
    "generation_seconds": 4.0,
    "unit_idle_ms": 400,
    "breaker_failures": 0,  # they are asked by tests of many failures
}
HASTY_CHECKS = PATIENT | {"check_deadline_ms": 200}
HASTY_MODEL = PATIENT | {"silence_seconds": 0.2, "generation_seconds": 0.5}


@dataclass
class Stack:
    """Three running gateways, a patient one and two that are hasty with one service, all with the same two fakes."""

    url: str
    inference: FakeInference
    safety: FakeSafety
    client: httpx.Client
    hasty: dict[str, httpx.Client]

    def ask(self, prompt: str = "Hello", *, hasty_with: str = "", **fields: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": prompt}]} | fields
        return self.hasty.get(hasty_with, self.client).post("/v1/chat/completions", json=body)

    def answer(self, pieces: list[str], **fields: Any) -> None:
        """Set what the fake model says."""
        self.inference.pieces = pieces
        for name, value in fields.items():
            setattr(self.inference, name, value)

    def break_safety(self, fault: str, direction: str, *, after: int = 0, text: str = "") -> None:
        """Let the classifier fail in checks of one direction, after some of them or on one text."""
        vars(self.safety).update(fault=fault, fault_direction=direction, fault_from=after, fault_text=text)


@contextmanager
def gateway(inference_url: str, safety_url: str, limits: dict[str, Any] = PATIENT) -> Iterator[str]:
    """A gateway in a thread; gives its URL."""
    values: dict[str, Any] = {"inference_url": inference_url, "safety_url": safety_url, "held_limit_characters": 3000}
    values |= {"served_model_name": "fake", "allowed_models": ("other", MARKER)} | limits
    with TemporaryDirectory() as folder:
        values.setdefault("audit_url", f"sqlite:///{folder}/audit.db")
        with serving(build_app(GatewaySettings(**values))) as url:
            yield url


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream: JSON objects, and the string [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def said(parts: list[Any]) -> str:
    """The text that a client puts together, without the gateway's own refusal."""
    choices = [part["choices"][0] for part in parts if part != "[DONE]" and part.get("choices")]
    return "".join(c["delta"].get("content", "") for c in choices if c["finish_reason"] != "content_filter")


def words(count: int, marker_at: int | None = None, *, sentence: int = 0) -> list[str]:
    """``word0 word1 ...``, the marker as word ``marker_at``, a full stop after every ``sentence`` words."""
    names = [MARKER if i == marker_at else f"word{i}" for i in range(count)]
    return [f"{name}{'.' if sentence and i % sentence == sentence - 1 else ''} " for i, name in enumerate(names)]


# Answers with the marker in every position that a cut could get wrong.
LEAK_CASES: dict[str, list[str]] = {
    "word 26 of 60": words(60, 25),
    "word 26 of 60, in sentences": words(60, 25, sentence=6),
    "first word": words(60, 0, sentence=6),
    "last word": [*words(59, sentence=6), MARKER],
    "last word of a sentence": [*words(20, sentence=6), f"{MARKER}.", " word. "],
    "split over two chunks": [*words(25, sentence=6), MARKER[:4], MARKER[4:] + " ", *words(20)],
    "letter by letter": list("".join(words(60, 25, sentence=6))),
    "across the length limit": ["a" * 190 + " ", *MARKER, " ", *words(20)],
    "across the length limit, one chunk": ["b" * 95 + " " + "a" * 98 + " " + MARKER + " " + "c" * 50, *words(20)],
    "all in one chunk": ["".join(words(60, 25, sentence=6))],
}


def by_sentence(length: int) -> Callable[[int], float]:
    """Pauses after each sentence of so many words, so that no two wait for their checks at the same time."""
    return lambda i: 0.05 if i % length == 0 else 0.0


def assert_nothing_leaked(response: httpx.Response, full: str) -> str:
    """No character of the marker or after it; returns what was released."""
    assert MARKER not in response.text
    released = said(events(response))
    assert full.startswith(released)
    assert len(released) <= full.index(MARKER)
    return released


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]} | fields


def assert_unavailable(response: httpx.Response, service: str) -> None:
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert MARKER not in response.text
    assert "word" not in response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "upstream_unavailable")
    assert error["message"].startswith(f"{service}: ")


def assert_ended_by_error(parts: list[Any], service: str) -> None:
    assert parts[-1]["error"]["code"] == "upstream_unavailable"
    assert parts[-1]["error"]["message"].startswith(f"{service}: ")
    assert all(part["choices"][0]["finish_reason"] is None for part in parts[:-1])
    assert "[DONE]" not in parts
