"""Gateways that redact or revise unsafe answers, and what the tests of both have in common."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gateway.audit_store import AuditStore
from gateway.policy_file import Route
from gateway.settings import OF_THE_POLICY
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_protocols import Speaker
from tests.fakes.gateway_stack import PATIENT, Stack, events, gateway
from tests.fakes.gateway_upstreams import MARKER, FakeCritique, FakeSafety, serving

REFUSAL = "I'm sorry, but I can't help with that."
POLICIES = {
    "redact": "{response: {action: redact}, stream: {idle_ms: 3000}}",
    "redact held": "{response: {action: redact}, stream: {unit: answer}}",
    "revise": "{response: {action: revise}, stream: {idle_ms: 3000}}",
    "revise held": "{response: {action: revise}, stream: {unit: answer}}",
    "shadow": "{response: {action: revise}, shadow: true}",
}
PATIENT_ROUTES = {route.value: {"check_deadline_ms": 1500} for route in Route}


@dataclass
class RepairStack(Stack):
    """One gateway for each policy, all with the same three fakes and one audit."""

    critique: FakeCritique
    audit: Path

    def last_record(self) -> dict[str, Any]:
        store = AuditStore(f"sqlite:///{self.audit}")
        try:
            return dict(json.loads(store.recent(1)[0].body))
        finally:
            store.close()


def policy_limits(file: Path, policy: str) -> dict[str, Any]:
    """Settings of a patient gateway with this policy for everybody."""
    file.write_text(f"schema_version: 1\ndefault: {policy}\nroutes: {PATIENT_ROUTES}\n")
    limits = {name: value for name, value in PATIENT.items() if name not in OF_THE_POLICY}
    return limits | {"policy_file": file, "held_limit_characters": 10_000}


@contextmanager
def repairing(folder: Path) -> Iterator[RepairStack]:
    """A running ``RepairStack`` with its files in ``folder``."""
    fakes = FakeInference(), FakeSafety(), FakeCritique()
    with ExitStack() as exits:
        urls = [exits.enter_context(serving(fake)) for fake in fakes]
        clients = {}
        for name, policy in POLICIES.items():
            limits = policy_limits(folder / f"{name}.yaml", policy) | {"critique_url": urls[2], "revise_seconds": 1.5}
            url = exits.enter_context(gateway(urls[0], urls[1], limits | {"audit_url": f"sqlite:///{folder}/audit.db"}))
            clients[name] = exits.enter_context(httpx.Client(base_url=url, timeout=20))
        redacting = clients["redact"]
        url = str(redacting.base_url).rstrip("/")
        yield RepairStack(url, fakes[0], fakes[1], redacting, clients, fakes[2], folder / "audit.db")


def sentences(count: int, *bad: int) -> list[str]:
    """So many sentences; those with the given numbers are unsafe."""
    return [f"The {MARKER} is number {i}. " if i in bad else f"This is number {i}. " for i in range(count)]


def with_removed(pieces: list[str]) -> str:
    return "".join("[removed] " if MARKER in piece else piece for piece in pieces)


def text_of(speaker: Speaker, response: httpx.Response, index: int = 0) -> str:
    """What a client puts together, whole or streamed, with what stands in place of what was removed."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return speaker.text(response, index)
    parts = [part for part in events(response) if part != "[DONE]"]
    if speaker.name.startswith("tgi"):
        assert [part["index"] for part in parts] == list(range(1, len(parts) + 1))
        text = "".join(part["token"]["text"] for part in parts if not part["token"]["special"])
        assert parts[-1]["generated_text"] == text
        return text
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return "".join(c["text"] if speaker.name == "completions" else c["delta"].get("content", "") for c in choices)


def note(response: httpx.Response) -> dict[str, Any]:
    """The first note that the gateway made."""
    streamed = response.headers["content-type"].startswith("text/event-stream")
    bodies = [part for part in events(response) if part != "[DONE]"] if streamed else [response.json()]
    found = [body["fedward"] for body in (bodies[0] if isinstance(bodies[0], list) else bodies) if "fedward" in body]
    return dict(found[0])


def repaired(response: httpx.Response, decision: str, *, whole: bool) -> dict[str, Any]:
    choices = {"choices": [0]} if whole else {}
    reason = "The answer was classified as unsafe: Violent crimes (S1)."
    told = {"blocked": False, "decision": decision, "direction": "response", "categories": ["S1"], "reason": reason}
    return told | choices
