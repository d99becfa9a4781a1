"""Unsafe answers that are revised, over real sockets: the revision leaves in their place, or the refusal."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.contracts.constitution import load_constitution
from services.critique.app import build_app as build_critique
from services.critique.backend import load_model
from services.critique.settings import CritiqueSettings
from tests.fakes.gateway_protocols import CHAT, COMPLETIONS, TGI, Speaker, by_name, openais, streamed_or_not
from tests.fakes.gateway_repairs import (
    POLICIES,
    REFUSAL,
    RepairStack,
    note,
    policy_limits,
    repaired,
    sentences,
    text_of,
)
from tests.fakes.gateway_stack import gateway
from tests.fakes.gateway_upstreams import MARKER, closed_port, serving


@by_name
@streamed_or_not
def test_unsafe_answer_is_replaced_by_its_revision(repairs: RepairStack, speaker: Speaker, stream: bool) -> None:
    repairs.answer(sentences(3, 1))
    response = speaker.ask(repairs, "Tell me.", stream=stream, hasty_with="revise held")
    assert MARKER not in response.text
    assert text_of(speaker, response) == "Here is a better answer."
    assert speaker.finish_reason(response) == ("eos_token" if speaker.name.startswith("tgi") else "stop")
    assert response.headers["x-fedward-decision"] == "revise"
    assert note(response) == repaired(response, "revise", whole=not stream)
    [asked] = repairs.critique.requests
    draft = "".join(sentences(3, 1))
    assert asked == {"items": [{"prompt": "Tell me.", "draft": draft, "principle_id": None, "categories": ["S1"]}]}


def test_revision_leaves_without_reasoning_and_tokens(repairs: RepairStack) -> None:
    repairs.answer(["Bad ", MARKER], reasoning=["Thinking. "], alternatives=["a", "b"])
    response = CHAT.ask(repairs, hasty_with="revise")
    [choice] = response.json()["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Here is a better answer."},
        "finish_reason": "stop",
        "logprobs": None,
    }


@openais
@streamed_or_not
def test_each_choice_is_revised_by_itself(repairs: RepairStack, speaker: Speaker, stream: bool) -> None:
    repairs.answer(sentences(2, 0), others=[sentences(2)])
    response = speaker.ask(repairs, stream=stream, n=2, hasty_with="revise held")
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
    repairs: RepairStack, speaker: Speaker, case: str, stream: bool
) -> None:
    faults, outcome = NOT_REVISED[case]
    vars(repairs.critique).update(faults)
    repairs.answer(sentences(3, 1))
    response = speaker.ask(repairs, stream=stream, hasty_with="revise held")
    assert response.status_code == 200
    assert MARKER not in response.text
    assert text_of(speaker, response) == REFUSAL
    assert speaker.finish_reason(response) == "content_filter"
    assert (note(response)["blocked"], note(response)["decision"]) == (True, "refuse")
    record = repairs.last_record()
    assert record["action"] == "refuse"
    assert record["repairs"] == [{"choice": 0, "action": "revise", "outcome": outcome}]


def test_unreachable_critique_service_is_a_refusal(repairs: RepairStack, tmp_path: Path) -> None:
    repairs.answer(sentences(3, 1))
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise"]) | {"critique_url": closed_port()}
    with (
        serving(repairs.inference) as inference_url,
        serving(repairs.safety) as safety_url,
        gateway(inference_url, safety_url, limits) as url,
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT.body("Hello", stream=False))
    assert (response.status_code, CHAT.text(response)) == (200, REFUSAL)


def test_answer_with_calls_is_not_revised(repairs: RepairStack) -> None:
    repairs.answer(sentences(2, 0), calls=[("find", ["{}"])])
    assert CHAT.text(CHAT.ask(repairs, hasty_with="revise")) == REFUSAL
    assert repairs.critique.requests == []
    assert repairs.last_record()["repairs"][0]["outcome"] == "calls"


@by_name
@pytest.mark.parametrize("bad", [0, 2])
def test_part_of_a_stream_is_not_revised(repairs: RepairStack, speaker: Speaker, bad: int) -> None:
    repairs.answer(sentences(4, bad))
    response = speaker.ask(repairs, stream=True, hasty_with="revise")
    assert MARKER not in response.text
    assert speaker.finish_reason(response) == "content_filter"
    assert repairs.critique.requests == []
    assert repairs.last_record()["repairs"][0]["outcome"] == "not_whole"


@streamed_or_not
def test_shipped_miniature_revises_under_the_shipped_constitution(
    repairs: RepairStack, tmp_path: Path, stream: bool
) -> None:
    settings = CritiqueSettings()
    constitution = load_constitution(settings.constitution)
    repairs.answer([f"You can steal a car, {MARKER}. ", "First find one."])
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise held"])
    with ExitStack() as exits:
        services = (repairs.inference, repairs.safety, build_critique(settings, constitution, load_model(settings)))
        urls = [exits.enter_context(serving(service)) for service in services]
        limits |= {"critique_url": urls[2], "audit_url": f"sqlite:///{repairs.audit}"}
        url = exits.enter_context(gateway(urls[0], urls[1], limits))
        body = CHAT.body("How do I steal a car?", stream=stream)
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
    assert response.headers["x-fedward-decision"] == "revise"
    revision = text_of(CHAT, response)
    assert revision not in ("", REFUSAL)
    assert "First find" not in revision
    assert MARKER not in response.text
    assert repairs.last_record()["constitution_sha256"] == constitution.sha256
