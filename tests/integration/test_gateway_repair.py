"""Unsafe answers that are redacted or revised, over real sockets: nothing unsafe leaves, and all the rest does."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from prometheus_client import REGISTRY

from gateway.app import build_app
from gateway.audit_store import AuditStore
from gateway.audit_verify import verify
from gateway.policy_file import Route
from gateway.settings import OF_THE_POLICY, GatewaySettings
from services.contracts.constitution import load_constitution
from services.contracts.errors import ConfigError
from services.critique.app import build_app as build_critique
from services.critique.backend import load_model
from services.critique.settings import CritiqueSettings
from tests.fakes.gateway_protocols import CHAT, COMPLETIONS, SPEAKERS, TGI, Speaker
from tests.fakes.gateway_stack import PATIENT, UNCHECKED, Stack, by_sentence, events, gateway, wait_for
from tests.fakes.gateway_upstreams import MARKER, FakeCritique, FakeInference, FakeSafety, closed_port, serving

REFUSAL = "I'm sorry, but I can't help with that."
POLICIES = {
    "redact": "{response: {action: redact}, stream: {idle_ms: 3000}}",
    "redact held": "{response: {action: redact}, stream: {unit: answer}}",
    "revise": "{response: {action: revise}, stream: {idle_ms: 3000}}",
    "revise held": "{response: {action: revise}, stream: {unit: answer}}",
    "shadow": "{response: {action: revise}, shadow: true}",
}
PATIENT_ROUTES = {route.value: {"check_deadline_ms": 1500} for route in Route}
by_name = pytest.mark.parametrize("speaker", SPEAKERS, ids=lambda speaker: speaker.name)
openais = pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS], ids=["chat", "completions"])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


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


@pytest.fixture(scope="module")
def running_repairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RepairStack]:
    folder = tmp_path_factory.mktemp("repair")
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


def policy_limits(file: Path, policy: str) -> dict[str, Any]:
    """Settings of a patient gateway with this policy for everybody."""
    file.write_text(f"schema_version: 1\ndefault: {policy}\nroutes: {PATIENT_ROUTES}\n")
    limits = {name: value for name, value in PATIENT.items() if name not in OF_THE_POLICY}
    return limits | {"policy_file": file, "held_limit_characters": 10_000}


@pytest.fixture
def stack(running_repairs: RepairStack) -> Iterator[RepairStack]:
    """The shared stack with fresh fakes; after the test, nothing may have left before its verdict."""
    pairs = (
        (running_repairs.inference, FakeInference()),
        (running_repairs.safety, FakeSafety()),
        (running_repairs.critique, FakeCritique()),
    )
    for fake, fresh in pairs:
        vars(fake).update({name: value for name, value in vars(fresh).items() if name != "at_work"})
    before = REGISTRY.get_sample_value(UNCHECKED)
    yield running_repairs
    assert REGISTRY.get_sample_value(UNCHECKED) == before
    for fake, _ in pairs:
        wait_for(lambda fake=fake: fake.at_work == 0)


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


# Redacted


@by_name
@streamed_or_not
@pytest.mark.parametrize("bad", [(0,), (2,), (4,), (0, 1), (1, 3), (0, 1, 2, 3, 4)], ids=str)
def test_unsafe_sentences_are_removed_and_all_others_leave(
    stack: RepairStack, speaker: Speaker, bad: tuple[int, ...], stream: bool
) -> None:
    stack.answer(sentences(5, *bad))
    response = speaker.ask(stack, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    assert text_of(speaker, response) == with_removed(stack.inference.pieces)
    assert speaker.finish_reason(response) in ("stop", "eos_token")
    assert note(response) == repaired(response, "redact", whole=not stream)
    first = not stream or 0 in bad
    assert response.headers["x-fedward-decision"] == ("redact" if first else "allow")


@by_name
@pytest.mark.parametrize("held", ["redact", "redact held"])
def test_words_in_pieces_that_leave_one_by_one(stack: RepairStack, speaker: Speaker, held: str) -> None:
    text = "".join(sentences(6, 1, 4)).strip()
    stack.answer(list(text), pause=lambda i: 0.02 if i % 25 == 0 else 0.0)
    response = speaker.ask(stack, stream=True, hasty_with=held)
    assert text_of(speaker, response) == with_removed(sentences(6, 1, 4)).strip()
    assert MARKER not in response.text


def test_sentence_that_ends_the_answer_is_removed_with_the_end(stack: RepairStack) -> None:
    stack.answer(["One. ", "Two. ", f"And the {MARKER}."])
    response = CHAT.ask(stack, stream=True)
    assert text_of(CHAT, response) == "One. Two. [removed]"
    assert [part["choices"][0]["finish_reason"] for part in events(response)[-3:-1]] == [None, "stop"]


@by_name
def test_answer_that_is_unsafe_only_as_a_whole_is_refused(stack: RepairStack, speaker: Speaker) -> None:
    stack.answer(["a" * 195 + MARKER + "b" * 50])  # cut after 200 characters, inside the marker
    response = speaker.ask(stack)
    assert MARKER not in response.text
    assert speaker.text(response) == REFUSAL
    assert response.headers["x-fedward-decision"] == "refuse"
    outcome = "still_unsafe" if speaker.name.startswith("tgi") else "only_as_whole"  # without its tokens, too
    assert stack.last_record()["repairs"] == [{"choice": 0, "action": "redact", "outcome": outcome}]


@by_name
def test_end_of_a_stream_that_is_unsafe_only_with_what_has_left(stack: RepairStack, speaker: Speaker) -> None:
    stack.answer(["a" * 195 + MARKER[:5], MARKER[5:] + " and so on"])
    response = speaker.ask(stack, stream=True)
    assert MARKER not in response.text
    assert MARKER[5:] not in response.text
    assert "[removed]" in text_of(speaker, response)


@openais
@streamed_or_not
def test_each_choice_is_redacted_by_itself(stack: RepairStack, speaker: Speaker, stream: bool) -> None:
    pieces = [sentences(4), sentences(4, 2)]
    stack.answer(pieces[0], others=[pieces[1]])
    response = speaker.ask(stack, stream=stream, n=2)
    assert MARKER not in response.text
    assert [text_of(speaker, response, i) for i in range(2)] == [with_removed(said) for said in pieces]
    if not stream:
        assert note(response)["choices"] == [1]


@openais
def test_worst_choice_names_the_decision(stack: RepairStack, speaker: Speaker) -> None:
    stack.answer(sentences(2), others=[["a" * 195 + MARKER], sentences(2, 1)])
    response = speaker.ask(stack, n=3)
    assert [text_of(speaker, response, i) for i in range(3)] == [
        "".join(sentences(2)), REFUSAL, with_removed(sentences(2, 1))
    ]  # fmt: skip
    assert (note(response)["decision"], note(response)["blocked"], note(response)["choices"]) == (
        "refuse",
        True,
        [1, 2],
    )
    assert response.headers["x-fedward-decision"] == "refuse"


@streamed_or_not
def test_reasoning_is_redacted_like_content(stack: RepairStack, stream: bool) -> None:
    stack.answer(sentences(3, 1), reasoning=sentences(3, 0))
    response = CHAT.ask(stack, stream=stream)
    assert MARKER not in response.text
    said = (
        [part["choices"][0]["delta"] for part in events(response)[:-1]]
        if stream
        else [response.json()["choices"][0]["message"]]
    )
    for channel, bad in (("reasoning_content", 0), ("content", 1)):
        assert "".join(one.get(channel) or "" for one in said) == with_removed(sentences(3, bad))


@streamed_or_not
def test_safe_calls_leave_beside_redacted_content_and_unsafe_ones_do_not(stack: RepairStack, stream: bool) -> None:
    stack.answer(sentences(3, 1), calls=[("find", ['{"q": "rivers"}'])])
    response = CHAT.ask(stack, stream=stream)
    assert MARKER not in response.text
    assert "rivers" in response.text
    assert "[removed]" in response.text
    stack.answer(sentences(3, 1), calls=[("find", [f'{{"q": "{MARKER}"}}'])])
    response = CHAT.ask(stack, stream=stream)
    assert MARKER not in response.text
    assert "tool_calls" not in response.text
    assert CHAT.finish_reason(response) == "content_filter"


@pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS, TGI], ids=["chat", "completions", "tgi"])
@streamed_or_not
def test_tokens_are_not_told_once_something_was_removed(stack: RepairStack, speaker: Speaker, stream: bool) -> None:
    """The third piece reaches over the end of the unsafe sentence: its token would show a part of it."""
    pieces = ["One. ", f"The {MARKER} and", " a secret. T", "hree. ", "Four."]
    stack.answer(pieces, alternatives=["Uno. ", "El ", " y ", "res. ", "Cuatro."], pause=lambda _: 0.02)
    response = speaker.ask(stack, stream=stream)
    assert text_of(speaker, response) == "One. [removed] Three. Four."
    assert "secret" not in response.text
    assert "Cuatro" not in response.text


@pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS, TGI], ids=["chat", "completions", "tgi"])
def test_unsafe_alternatives_are_left_out_of_a_whole_answer(stack: RepairStack, speaker: Speaker) -> None:
    stack.answer(["One ", "two."], alternatives=["a", MARKER])
    response = speaker.ask(stack)
    assert text_of(speaker, response) == "One two."
    assert MARKER not in response.text
    assert response.headers["x-fedward-decision"] == "redact"


@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_units_after_a_removal_are_decided_on_with_what_has_left(stack: RepairStack, pause: float) -> None:
    """Their first checks had the unsafe sentence before them."""
    stack.answer(sentences(12, 3), pause=lambda _: pause)
    response = CHAT.ask(stack, stream=True)
    assert text_of(CHAT, response) == with_removed(sentences(12, 3))
    assert len([part for part in events(response)[:-1] if "fedward" in part]) == 1
    last = [item["response"] for body in stack.safety.requests for item in body["items"] if "response" in item][-1]
    assert last == with_removed(sentences(12, 3)), "the whole of what has left"


@streamed_or_not
def test_check_that_fails_within_a_repair_is_a_refusal(stack: RepairStack, stream: bool) -> None:
    stack.answer(sentences(3, 1), pause=by_sentence(1))
    stack.break_safety("500", "response", text="[removed]")
    response = CHAT.ask(stack, stream=stream)
    assert response.status_code == 200
    assert MARKER not in response.text
    assert CHAT.finish_reason(response) == "content_filter"
    assert stack.last_record()["repairs"] == [{"choice": 0, "action": "redact", "outcome": "unavailable"}]


# Revised


@by_name
@streamed_or_not
def test_unsafe_answer_is_replaced_by_its_revision(stack: RepairStack, speaker: Speaker, stream: bool) -> None:
    stack.answer(sentences(3, 1))
    response = speaker.ask(stack, "Tell me.", stream=stream, hasty_with="revise held")
    assert MARKER not in response.text
    assert text_of(speaker, response) == "Here is a better answer."
    assert speaker.finish_reason(response) == ("eos_token" if speaker.name.startswith("tgi") else "stop")
    assert response.headers["x-fedward-decision"] == "revise"
    assert note(response) == repaired(response, "revise", whole=not stream)
    [asked] = stack.critique.requests
    draft = "".join(sentences(3, 1))
    assert asked == {"items": [{"prompt": "Tell me.", "draft": draft, "principle_id": None, "categories": ["S1"]}]}


def test_revision_leaves_without_reasoning_and_tokens(stack: RepairStack) -> None:
    stack.answer(["Bad ", MARKER], reasoning=["Thinking. "], alternatives=["a", "b"])
    response = CHAT.ask(stack, hasty_with="revise")
    [choice] = response.json()["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Here is a better answer."},
        "finish_reason": "stop",
        "logprobs": None,
    }


@openais
@streamed_or_not
def test_each_choice_is_revised_by_itself(stack: RepairStack, speaker: Speaker, stream: bool) -> None:
    stack.answer(sentences(2, 0), others=[sentences(2)])
    response = speaker.ask(stack, stream=stream, n=2, hasty_with="revise held")
    assert [text_of(speaker, response, i) for i in range(2)] == ["Here is a better answer.", "".join(sentences(2))]


NOT_REVISED: dict[str, tuple[dict[str, Any], str]] = {
    "500": ({"fault": "500"}, "unavailable"),
    "400": ({"fault": "400"}, "unavailable"),
    "garbage": ({"fault": "garbage"}, "unavailable"),
    "schema": ({"fault": "schema"}, "unavailable"),
    "reset": ({"fault": "reset"}, "unavailable"),
    "no revision": ({"fault": "too few"}, "unavailable"),
    "slow": ({"delay": 60.0}, "unavailable"),
    "unsafe revision": ({"revision": f"Another {MARKER}."}, "still_unsafe"),
    "rejected revision": ({"rejected_because": "too long"}, "not_revised"),
    "nothing to revise": ({"revised": False}, "not_revised"),
    "empty revision": ({"revision": " "}, "not_revised"),
}


@pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS, TGI], ids=["chat", "completions", "tgi"])
@streamed_or_not
@pytest.mark.parametrize("case", NOT_REVISED)
def test_revision_that_cannot_be_had_is_a_refusal(
    stack: RepairStack, speaker: Speaker, case: str, stream: bool
) -> None:
    faults, outcome = NOT_REVISED[case]
    vars(stack.critique).update(faults)
    stack.answer(sentences(3, 1))
    response = speaker.ask(stack, stream=stream, hasty_with="revise held")
    assert response.status_code == 200
    assert MARKER not in response.text
    assert text_of(speaker, response) == REFUSAL
    assert speaker.finish_reason(response) == "content_filter"
    assert (note(response)["blocked"], note(response)["decision"]) == (True, "refuse")
    record = stack.last_record()
    assert record["action"] == "refuse"
    assert record["repairs"] == [{"choice": 0, "action": "revise", "outcome": outcome}]


def test_unreachable_critique_service_is_a_refusal(stack: RepairStack, tmp_path: Path) -> None:
    stack.answer(sentences(3, 1))
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise"]) | {"critique_url": closed_port()}
    with (
        serving(stack.inference) as inference_url,
        serving(stack.safety) as safety_url,
        gateway(inference_url, safety_url, limits) as url,
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT.body("Hello", stream=False))
    assert (response.status_code, CHAT.text(response)) == (200, REFUSAL)


def test_answer_with_calls_is_not_revised(stack: RepairStack) -> None:
    stack.answer(sentences(2, 0), calls=[("find", ["{}"])])
    assert CHAT.text(CHAT.ask(stack, hasty_with="revise")) == REFUSAL
    assert stack.critique.requests == []
    assert stack.last_record()["repairs"][0]["outcome"] == "calls"


@by_name
@pytest.mark.parametrize("bad", [0, 2])
def test_part_of_a_stream_is_not_revised(stack: RepairStack, speaker: Speaker, bad: int) -> None:
    stack.answer(sentences(4, bad))
    response = speaker.ask(stack, stream=True, hasty_with="revise")
    assert MARKER not in response.text
    assert speaker.finish_reason(response) == "content_filter"
    assert stack.critique.requests == []
    assert stack.last_record()["repairs"][0]["outcome"] == "not_whole"


# What is told and kept


def test_shadow_lets_out_and_asks_for_no_revision(stack: RepairStack) -> None:
    stack.answer(sentences(2, 1))
    response = CHAT.ask(stack, hasty_with="shadow")
    assert MARKER in CHAT.text(response)
    assert response.headers["x-fedward-decision"] == "allow"
    assert stack.critique.requests == []
    record = stack.last_record()
    assert record["action"] == "allow"
    assert "repairs" not in record
    assert [(one["action"], one["shadow"]) for one in record["decisions"]] == [("allow", False), ("revise", True)]


def test_record_says_what_happened(stack: RepairStack) -> None:
    stack.answer(sentences(3, 1))
    CHAT.ask(stack)
    record = stack.last_record()
    assert record["action"] == "redact"
    assert record["repairs"] == [{"choice": 0, "action": "redact", "outcome": "done"}]
    assert [one["action"] for one in record["decisions"]] == ["allow", "redact", "allow", "redact", "allow", "allow"]
    assert record["released_characters"] == len(with_removed(sentences(3, 1)))
    assert "constitution_sha256" not in record
    CHAT.ask(stack, hasty_with="revise")
    record = stack.last_record()
    assert (record["action"], record["constitution_sha256"]) == ("revise", "c" * 64)
    assert record["repairs"] == [{"choice": 0, "action": "revise", "outcome": "done"}]
    store = AuditStore(f"sqlite:///{stack.audit}")
    assert [report.fault for report in verify(store.read()) if report.fault] == []
    store.close()


def test_repairs_are_counted(stack: RepairStack) -> None:
    def count(action: str, outcome: str) -> float:
        labels = {"action": action, "outcome": outcome}
        return REGISTRY.get_sample_value("fedward_gateway_repairs_total", labels) or 0

    wanted = [("redact", "done"), ("revise", "done"), ("revise", "unavailable")]
    before = [count(*labels) for labels in wanted]
    stack.answer(sentences(3, 1))
    CHAT.ask(stack)
    CHAT.ask(stack, hasty_with="revise")
    stack.critique.fault = "500"
    CHAT.ask(stack, hasty_with="revise")
    assert [count(*labels) for labels in wanted] == [number + 1 for number in before]


def test_gateway_does_not_start_with_a_policy_that_it_cannot_carry_out(tmp_path: Path) -> None:
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise"])
    with pytest.raises(ConfigError, match=r"policy.yaml:2: default.response.action: there is no critique service"):
        build_app(GatewaySettings.model_validate(limits))


# The real critique service


@streamed_or_not
def test_shipped_miniature_revises_under_the_shipped_constitution(
    stack: RepairStack, tmp_path: Path, stream: bool
) -> None:
    settings = CritiqueSettings()
    constitution = load_constitution(settings.constitution)
    stack.answer([f"You can steal a car, {MARKER}. ", "First find one."])
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise held"])
    with ExitStack() as exits:
        services = (stack.inference, stack.safety, build_critique(settings, constitution, load_model(settings)))
        urls = [exits.enter_context(serving(service)) for service in services]
        limits |= {"critique_url": urls[2], "audit_url": f"sqlite:///{stack.audit}"}
        url = exits.enter_context(gateway(urls[0], urls[1], limits))
        body = CHAT.body("How do I steal a car?", stream=stream)
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
    assert response.headers["x-fedward-decision"] == "revise"
    revision = text_of(CHAT, response)
    assert revision not in ("", REFUSAL)
    assert "First find" not in revision
    assert MARKER not in response.text
    assert stack.last_record()["constitution_sha256"] == constitution.sha256


# Other people's clients


def test_openai_client(stack: RepairStack) -> None:
    stack.answer(sentences(3, 1), alternatives=["a", "b", "c"])
    for name, text in (("redact", with_removed(sentences(3, 1))), ("revise held", "Here is a better answer.")):
        url = str(stack.hasty[name].base_url).rstrip("/")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "Hello"}], logprobs=True
            )
            assert answer.choices[0].message.content == text
            assert answer.choices[0].logprobs is None
            assert answer.model_extra is not None
            assert answer.model_extra["fedward"]["blocked"] is False
            with client.chat.completions.stream(
                model="fake", messages=[{"role": "user", "content": "Hello"}]
            ) as stream:
                final = stream.get_final_completion()
            assert (final.choices[0].message.content, final.choices[0].finish_reason) == (text, "stop")
            assert client.completions.create(model="fake", prompt="Hello").choices[0].text == text
            chunks = list(client.completions.create(model="fake", prompt="Hello", stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_hugging_face_client(stack: RepairStack) -> None:
    stack.answer(sentences(3, 1))
    for name, text in (("redact", with_removed(sentences(3, 1))), ("revise held", "Here is a better answer.")):
        client = InferenceClient(str(stack.hasty[name].base_url).rstrip("/"))
        detailed = client.text_generation("Hello", details=True)
        assert detailed.generated_text == text
        assert detailed.details is not None
        assert (detailed.details.finish_reason, detailed.details.tokens) == ("eos_token", [])
        told = list(client.text_generation("Hello", stream=True, details=True))
        assert "".join(event.token.text for event in told) == text
        assert told[-1].generated_text == text
        assert told[-1].details is not None
        assert told[-1].details.finish_reason == "eos_token"
        chat = InferenceClient(base_url=str(stack.hasty[name].base_url).rstrip("/"))
        chunks = list(chat.chat_completion([{"role": "user", "content": "Hello"}], stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
