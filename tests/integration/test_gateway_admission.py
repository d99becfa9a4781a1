"""Who asks, policies, quotas and the audit around requests, on a running gateway between two fake services."""

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from gateway.app import build_app
from gateway.audit_store import AuditStore
from gateway.keys_command import main as keys
from gateway.settings import GatewaySettings
from services.contracts.errors import ConfigError
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import PATIENT, chat_body, events, said, wait_for
from tests.fakes.gateway_upstreams import MARKER, FakeSafety, serving

POLICY = """\
schema_version: 1
tenants:
  strict:
    models: [other]
  trial:
    shadow: true
  slow:
    stream: {unit: answer}
  guided:
    system_prompt: Answer in one sentence.
"""
LIMITS = """\
[tenants.few]
requests = "2/hour"
[tenants.moderator]
requests = "3/hour"
tokens = "100/hour"
[tenants.hasty]
tokens = "100000/hour"
"""


class Door(NamedTuple):
    """A gateway with API keys, a policy file, limits and an audit."""

    url: str
    inference: FakeInference
    safety: FakeSafety
    keys: dict[str, str]
    audit: Path

    def post(self, tenant: str, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        body = chat_body(**fields) if path.startswith("/v1/chat") else fields
        return httpx.post(self.url + path, json=body, headers=self.header(tenant), timeout=20)

    def header(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    def records(self, tenant: str) -> list[dict[str, Any]]:
        store = AuditStore(f"sqlite:///{self.audit}")
        try:
            return [json.loads(row.body) for row in store.recent(100, tenant)]
        finally:
            store.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("door")
    file, secrets = folder / "keys.json", {}
    for tenant in ("strict", "trial", "slow", "guided", "few", "moderator", "hasty", "plain"):
        secrets[tenant] = create_key(file, tenant)
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "limits.toml").write_text(LIMITS)
    inference, safety = FakeInference(), FakeSafety()
    with ExitStack() as exits:
        urls = [exits.enter_context(serving(service)) for service in (inference, safety)]
        values: dict[str, Any] = {name: value for name, value in PATIENT.items() if name.endswith("seconds")}
        values |= {
            "inference_url": urls[0],
            "safety_url": urls[1],
            "served_model_name": "fake",
            "allowed_models": ("other",),
            "auth": "keys",
            "keys_file": file,
            "policy_file": folder / "policy.yaml",
            "limits_file": folder / "limits.toml",
            "audit_url": f"sqlite:///{folder}/audit.db",
        }
        settings = GatewaySettings.model_validate(values)
        url = exits.enter_context(serving(build_app(settings)))
        yield Door(url, inference, safety, secrets, folder / "audit.db")


def create_key(file: Path, tenant: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert keys(["create", "--file", str(file), "--tenant", tenant, "--name", "test"]) == 0
    return printed.getvalue().strip()


@pytest.fixture(autouse=True)
def quiet(door: Door) -> None:
    vars(door.inference).update(pieces=["All ", "is ", "well."], fault=None, fault_at=0, alter=lambda said: said)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/fake"),
        ("POST", "/generate"),
        ("POST", "/generate_stream"),
        ("POST", "/"),
        ("GET", "/info"),
    ],
)
def test_nobody_gets_in_without_a_key(door: Door, method: str, path: str) -> None:
    answer = httpx.request(method, door.url + path, json=chat_body() if method == "POST" else None)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer ")


def test_official_client_with_and_without_a_valid_key(door: Door) -> None:
    with OpenAI(base_url=f"{door.url}/v1", api_key=door.keys["plain"], max_retries=0) as client:
        answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hello"}])
        assert answer.choices[0].message.content == "All is well."
    wrong = OpenAI(base_url=f"{door.url}/v1", api_key="fw-wrong", max_retries=0)
    with wrong as client, pytest.raises(AuthenticationError, match="not known"):
        client.models.list()


def test_request_is_recorded_with_its_decisions_and_without_its_text(door: Door) -> None:
    door.post("plain", messages=[{"role": "user", "content": "Which rivers are long?"}])
    record = door.records("plain")[0]
    assert record["route"] == "chat"
    assert record["action"] == "allow"
    assert record["key_name"] == "test"
    assert record["released_characters"] == len("All is well.")
    assert [decision["direction"] for decision in record["decisions"]] == ["prompt", "response"]
    assert len(record["prompt_hmac"]) == len(record["policy_sha256"]) == 64
    assert b"rivers" not in door.audit.read_bytes()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream": True}),
        ("/generate", {"inputs": "Hello"}),
        ("/generate_stream", {"inputs": "Hello"}),
    ],
)
def test_adapter_that_answered_is_recorded_in_every_protocol(door: Door, path: str, body: dict[str, Any]) -> None:
    door.inference.adapter = "ab" * 32
    assert door.post("plain", path, **body).status_code == 200
    record = door.records("plain")[0]
    assert record["model"] == "fake"
    assert record["adapter_sha256"] == ("ad" * 32 if "chat" in path else "ab" * 32)  # what the body says comes first


def test_services_are_asked_under_the_id_of_the_request(door: Door) -> None:
    header = door.header("plain") | {"x-request-id": "visitor 7"}
    answer = httpx.post(f"{door.url}/v1/chat/completions", json=chat_body(), headers=header)
    assert answer.headers["x-request-id"] == "visitor 7"
    assert door.inference.headers["x-request-id"] == door.safety.headers["x-request-id"] == "visitor 7"
    assert "authorization" not in door.inference.headers
    assert "authorization" not in door.safety.headers


def test_blocked_answer_is_recorded_as_refused(door: Door) -> None:
    door.inference.pieces = ["Now ", MARKER, "."]
    assert door.post("plain", stream=True).status_code == 200
    record = door.records("plain")[0]
    assert (record["action"], record["released_characters"]) == ("refuse", 0)


def test_policy_does_not_allow_every_model_to_every_tenant(door: Door) -> None:
    assert door.post("plain", model="fake").status_code == 200
    assert door.post("strict", model="fake").status_code == 404
    assert door.records("strict")[0]["error"] == "model_not_found"


def test_models_are_listed_as_the_policy_allows_them(door: Door) -> None:
    for tenant, names in (("plain", ["fake", "other"]), ("strict", ["other"])):
        listed = httpx.get(f"{door.url}/v1/models", headers=door.header(tenant)).json()
        assert [card["id"] for card in listed["data"]] == names
        one = httpx.get(f"{door.url}/v1/models/fake", headers=door.header(tenant))
        assert one.status_code == (200 if "fake" in names else 404)


def test_shadow_lets_out_and_records_what_it_would_have_done(door: Door) -> None:
    door.inference.pieces = ["Now ", MARKER, "."]
    answer = door.post("trial")
    assert MARKER in answer.json()["choices"][0]["message"]["content"]
    assert answer.headers["x-fedward-decision"] == "allow"
    record = door.records("trial")[0]
    assert record["action"] == "allow"
    assert [(one["action"], one["shadow"]) for one in record["decisions"]] == [("allow", False), ("refuse", True)]


def test_whole_answer_as_the_unit_of_a_stream(door: Door) -> None:
    door.inference.pieces = [f"Sentence {i}. " for i in range(10)]
    parts = events(door.post("slow", stream=True))
    assert said(parts) == "".join(door.inference.pieces)
    texts = [part["choices"][0]["delta"].get("content") for part in parts if part != "[DONE]" and part["choices"]]
    assert sum(1 for text in texts if text) == 1
    assert len(door.records("slow")[0]["decisions"]) == 2


def test_system_prompt_of_the_policy_goes_upstream(door: Door) -> None:
    door.post("guided")
    assert door.inference.requests[-1]["messages"][0] == {"role": "system", "content": "Answer in one sentence."}


def test_requests_over_the_limit_are_told_when_to_come_again(door: Door) -> None:
    first = door.post("few")
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert door.post("few", stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    refused = door.post("few", "/generate", inputs="Hello")
    assert refused.status_code == 429
    assert refused.json()["error_type"] == "overloaded"
    assert int(refused.headers["retry-after"]) > 1
    few = OpenAI(base_url=f"{door.url}/v1", api_key=door.keys["few"], max_retries=0)
    with few as client, pytest.raises(RateLimitError, match="limit of requests met"):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hello"}])
    assert [record.get("error") for record in door.records("few")[:2]] == ["rate_limit_exceeded"] * 2


@pytest.mark.parametrize("how", ["client leaves", "model breaks off"])
def test_stream_that_is_cut_off_counts_with_what_has_left(door: Door, how: str) -> None:
    before, known = tokens_left(door, "hasty"), len(door.records("hasty"))
    door.inference.pieces = [f"Sentence number {i} of many. " for i in range(200)]
    if how == "model breaks off":
        door.inference.fault, door.inference.fault_at = "reset", 100
    else:  # the answer must not be over before the client has gone
        door.inference.pause = lambda i: 60.0 if i == 150 else 0.0
    body = chat_body(stream=True, max_tokens=1)
    with httpx.stream(
        "POST", f"{door.url}/v1/chat/completions", json=body, headers=door.header("hasty"), timeout=20
    ) as answer:
        for i, _ in enumerate(answer.iter_lines()):
            if how == "client leaves" and i == 40:
                break
    wait_for(lambda: len(door.records("hasty")) > known)
    cut = door.records("hasty")[0]
    assert cut["error"] == ("client_left" if how == "client leaves" else "upstream_unavailable")
    assert cut["released_characters"] > 400
    taken = before - tokens_left(door, "hasty")
    assert taken == pytest.approx(cut["released_characters"] / 4, abs=10)


def tokens_left(door: Door, tenant: str) -> int:
    """What is left of the quota after a short request, which takes a handful."""
    door.inference.pieces, door.inference.fault = ["Yes."], None
    return int(door.post(tenant, max_tokens=1).headers["x-ratelimit-remaining-tokens"])


def test_answer_that_is_no_answer_is_recorded_as_an_error(door: Door) -> None:
    door.inference.alter = lambda said: said | {"usage": {"prompt_tokens": float("nan")}}
    assert door.post("plain").status_code == 503
    record = door.records("plain")[0]
    assert (record["action"], record["error"], record["released_characters"]) == ("error", "upstream_unavailable", 0)


def test_moderations_count_with_their_text_and_lists_of_models_do_not(door: Door) -> None:
    for path in ("/v1/models", "/v1/models/fake"):
        assert httpx.get(door.url + path, headers=door.header("moderator")).status_code == 200
    first = door.post("moderator", "/v1/moderations", input=["a" * 20, "b" * 20])
    assert first.json()["results"][0]["flagged"] is False
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-tokens"] == "90"
    long = door.post("moderator", "/v1/moderations", input="a" * 400)
    assert (long.status_code, long.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    for status in (200, 200, 429):
        assert door.post("moderator", "/v1/moderations", input="fine").status_code == status
    assert [record.get("error") for record in door.records("moderator")[:2]] == ["rate_limit_exceeded", None]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_body_over_the_limit_is_refused_in_tgis_words(door: Door, path: str) -> None:
    refused = door.post("plain", path, inputs="a" * 4_000_001)
    assert refused.status_code == 413
    assert refused.json().keys() == {"error", "error_type"}
    assert refused.json()["error_type"] == "validation"


def test_stream_may_be_asked_for_by_whatever_means_true(door: Door) -> None:
    for value in (True, 1, "true"):
        answer = door.post("plain", stream=value)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert said(events(answer)) == "All is well."
    refused = door.post("plain", stream="perhaps")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


def test_request_that_cannot_be_read_and_client_that_leaves_are_recorded(door: Door) -> None:
    assert door.post("plain", messages=[]).status_code == 400
    assert door.records("plain")[0]["error"] == "invalid_request"
    door.inference.pieces = ["One. "] * 200
    before = len(door.records("plain"))
    url, body = f"{door.url}/v1/chat/completions", chat_body(stream=True)
    with httpx.stream("POST", url, json=body, headers=door.header("plain")) as answer:
        next(answer.iter_bytes())
    wait_for(lambda: len(door.records("plain")) > before)


def test_gateway_does_not_start_where_others_can_reach_it_without_identity() -> None:
    with pytest.raises(ConfigError, match="--auth is none"):
        build_app(GatewaySettings(host="0.0.0.0"))


@pytest.mark.parametrize("name", ["prompt_threshold", "unit_characters"])
def test_policy_file_and_its_settings_exclude_each_other(tmp_path: Path, name: str) -> None:
    value = 0.5 if name == "prompt_threshold" else 100
    with pytest.raises(ValueError, match=f"{name}: the policy file says this"):
        GatewaySettings.model_validate({"policy_file": tmp_path / "policy.yaml", name: value})
