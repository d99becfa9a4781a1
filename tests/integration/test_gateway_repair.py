"""What is told and kept of answers that are redacted or revised, and how other people's clients take them."""

from pathlib import Path

import openai
import pytest
from huggingface_hub import InferenceClient
from prometheus_client import REGISTRY

from gateway.app import build_app
from gateway.audit_store import AuditStore
from gateway.audit_verify import verify
from gateway.settings import GatewaySettings
from services.contracts.errors import ConfigError
from tests.fakes.gateway_protocols import CHAT
from tests.fakes.gateway_repairs import POLICIES, RepairStack, policy_limits, sentences, with_removed
from tests.fakes.gateway_upstreams import MARKER


def test_shadow_lets_out_and_asks_for_no_revision(repairs: RepairStack) -> None:
    repairs.answer(sentences(2, 1))
    response = CHAT.ask(repairs, hasty_with="shadow")
    assert MARKER in CHAT.text(response)
    assert response.headers["x-fedward-decision"] == "allow"
    assert repairs.critique.requests == []
    record = repairs.last_record()
    assert record["action"] == "allow"
    assert "repairs" not in record
    assert [(one["action"], one["shadow"]) for one in record["decisions"]] == [("allow", False), ("revise", True)]


def test_record_says_what_happened(repairs: RepairStack) -> None:
    repairs.answer(sentences(3, 1))
    CHAT.ask(repairs)
    record = repairs.last_record()
    assert record["action"] == "redact"
    assert record["repairs"] == [{"choice": 0, "action": "redact", "outcome": "done"}]
    assert [one["action"] for one in record["decisions"]] == ["allow", "redact", "allow", "redact", "allow", "allow"]
    assert record["released_characters"] == len(with_removed(sentences(3, 1)))
    assert "constitution_sha256" not in record
    CHAT.ask(repairs, hasty_with="revise")
    record = repairs.last_record()
    assert (record["action"], record["constitution_sha256"]) == ("revise", "c" * 64)
    assert record["repairs"] == [{"choice": 0, "action": "revise", "outcome": "done"}]
    store = AuditStore(f"sqlite:///{repairs.audit}")
    assert [report.fault for report in verify(store.read()) if report.fault] == []
    store.close()


def test_repairs_are_counted(repairs: RepairStack) -> None:
    def count(action: str, outcome: str) -> float:
        labels = {"action": action, "outcome": outcome}
        return REGISTRY.get_sample_value("fedward_gateway_repairs_total", labels) or 0

    wanted = [("redact", "done"), ("revise", "done"), ("revise", "unavailable")]
    before = [count(*labels) for labels in wanted]
    repairs.answer(sentences(3, 1))
    CHAT.ask(repairs)
    CHAT.ask(repairs, hasty_with="revise")
    repairs.critique.fault = "500"
    CHAT.ask(repairs, hasty_with="revise")
    assert [count(*labels) for labels in wanted] == [number + 1 for number in before]


def test_gateway_does_not_start_with_a_policy_that_it_cannot_carry_out(tmp_path: Path) -> None:
    limits = policy_limits(tmp_path / "policy.yaml", POLICIES["revise"])
    with pytest.raises(ConfigError, match=r"policy.yaml:2: default.response.action: there is no critique service"):
        build_app(GatewaySettings.model_validate(limits))


def test_openai_client(repairs: RepairStack) -> None:
    repairs.answer(sentences(3, 1), alternatives=["a", "b", "c"])
    for name, text in (("redact", with_removed(sentences(3, 1))), ("revise held", "Here is a better answer.")):
        url = str(repairs.hasty[name].base_url).rstrip("/")
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


def test_hugging_face_client(repairs: RepairStack) -> None:
    repairs.answer(sentences(3, 1))
    for name, text in (("redact", with_removed(sentences(3, 1))), ("revise held", "Here is a better answer.")):
        client = InferenceClient(str(repairs.hasty[name].base_url).rstrip("/"))
        detailed = client.text_generation("Hello", details=True)
        assert detailed.generated_text == text
        assert detailed.details is not None
        assert (detailed.details.finish_reason, detailed.details.tokens) == ("eos_token", [])
        told = list(client.text_generation("Hello", stream=True, details=True))
        assert "".join(event.token.text for event in told) == text
        assert told[-1].generated_text == text
        assert told[-1].details is not None
        assert told[-1].details.finish_reason == "eos_token"
        chat = InferenceClient(base_url=str(repairs.hasty[name].base_url).rstrip("/"))
        chunks = list(chat.chat_completion([{"role": "user", "content": "Hello"}], stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
