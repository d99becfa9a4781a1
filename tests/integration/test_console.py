"""The console's files and data over HTTP: who sees what, and that nothing else gets out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from gateway.console.app import STATIC
from gateway.policy_file import Route, read_policies
from tests.fakes.console_stack import POLICY, SYSTEM_PROMPT, Guarded, guarded_gateway
from tests.fakes.gateway_stack import wait_for
from tests.fakes.gateway_upstreams import MARKER, closed_port

API = ["session", "decisions", "decisions/stream?request_id=1", "policy", "health"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.watched_file.LOOK_SECONDS", 0.02)
        with guarded_gateway(tmp_path_factory.mktemp("guarded")) as gateway:
            yield gateway


@pytest.mark.parametrize("path", ["console", *(f"console/{file.name}" for file in STATIC.iterdir())])
def test_page_and_its_files_are_open_and_confined(guarded: Guarded, path: str) -> None:
    answer = guarded.client.get(f"/{path}")
    assert answer.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[a-z]", text), "an external asset"
    if file.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text)


def test_there_are_no_other_files(guarded: Guarded) -> None:
    for name in ("app.py", "..%2Fapp.py", "%2e%2e/views.py", "api/nothing"):
        assert guarded.client.get(f"/console/{name}").status_code == 404


@pytest.mark.parametrize("path", API)
def test_nobody_gets_data_without_a_key(guarded: Guarded, path: str) -> None:
    answer = guarded.client.get(f"/console/api/{path}")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer ")


def test_session_names_the_tenant_and_what_it_may_ask_for(guarded: Guarded) -> None:
    session = guarded.get("session", "strict")
    assert (session["tenant"], session["key_name"], session["models"]) == ("strict", "test", ["other"])
    assert session["shadow"] == []
    assert session["categories"]["S1"] == "Violent crimes"
    assert guarded.get("session", "trial")["shadow"] == ["chat", "completions", "generate"]


def test_a_tenant_sees_its_own_decisions_without_a_word_of_text(guarded: Guarded) -> None:
    guarded.chat("plain", f"Where is the {MARKER}?", **{"x-request-id": "of-plain"})
    guarded.chat("trial", **{"x-request-id": "of-trial"})
    page = guarded.get("decisions", "plain")
    record = page["records"][0]
    assert record["request_id"] == "of-plain"
    assert {record["tenant"] for record in page["records"]} == {"plain"}
    assert (record["action"], record["decisions"][0]["categories"]) == ("refuse", ["S1"])
    assert record["decisions"][0]["verdicts"][0]["score"] == 0.9
    assert MARKER not in json.dumps(page)
    assert not record.keys() & {"prompt_hmac", "text_sha256", "text"}


def test_pages_follow_each_other_without_gap_or_repetition(guarded: Guarded) -> None:
    asked = [f"page-{i}" for i in range(7)]
    for request_id in asked:
        guarded.chat("strict", **{"x-request-id": request_id})
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = guarded.get(f"decisions?limit=3{cursor and '&before=' + cursor}", "strict")
        seen += [record["request_id"] for record in page["records"]]
        cursor = page["next"]
    assert seen == asked[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "before=nonsense", f"before={'0' * 24}_1_xyz"])
def test_malformed_page_is_refused_by_name(guarded: Guarded, query: str) -> None:
    answer = guarded.client.get(f"/console/api/decisions?{query}", headers=guarded.header("plain"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


def test_live_events_tell_of_checks_and_of_no_text(guarded: Guarded) -> None:
    guarded.inference.pieces = ["All is well. ", f"Here comes the {MARKER}. "]
    url = "/console/api/decisions/stream?request_id=live-1"
    with guarded.client.stream("GET", url, headers=guarded.header("plain")) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        assert json.loads(next(lines))["state"] == "waiting"
        guarded.chat("plain", **{"x-request-id": "live-1"})
        rest = list(lines)
    guarded.inference.pieces = ["All is well. "]
    told = [json.loads(line) for line in rest]
    decisions = [decision for event in told for decision in event["decisions"]]
    assert [(d["direction"], d["action"]) for d in decisions[:2]] == [("prompt", "allow"), ("response", "allow")]
    assert decisions[-1]["action"] == "refuse"
    assert told[-1]["state"] == "over"
    assert told[-1]["released"] == len("All is well. ")
    assert "well" not in "".join(rest)
    assert MARKER not in "".join(rest)


def test_policy_is_that_of_the_tenant_with_its_hash(guarded: Guarded) -> None:
    in_force = read_policies(guarded.policy)
    told = guarded.get("policy", "strict")
    assert told["from_file"]
    assert told["amiss"] is None
    for route in Route:
        assert told["routes"][route.value]["sha256"] == in_force.of("strict", route).sha256
    chat = told["routes"]["chat"]
    assert (chat["response"]["threshold"], chat["response"]["categories"]["S4"]["threshold"]) == (0.25, 0.1)
    assert chat["system_prompt_characters"] == len(SYSTEM_PROMPT)
    assert SYSTEM_PROMPT not in json.dumps(told)


def test_file_that_is_not_in_force_is_told_without_other_tenants_names(guarded: Guarded) -> None:
    guarded.policy.write_text(POLICY.replace("shadow: true", "shadow: perhaps"))
    wait_for(lambda: guarded.get("health", "plain")["amiss"])
    told = guarded.get("health", "plain")["amiss"]["policy"]
    assert told == guarded.get("policy", "plain")["amiss"]
    assert "log" in told
    assert "trial" not in told
    guarded.policy.write_text(POLICY)
    wait_for(lambda: not guarded.get("health", "plain")["amiss"])


def test_reason_is_told_where_everybody_is_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.watched_file.LOOK_SECONDS", 0.02)
    with guarded_gateway(tmp_path, auth="none", keys_file=None) as gateway:
        gateway.policy.write_text(POLICY.replace("shadow: true", "shadow: perhaps"))
        wait_for(lambda: gateway.get("policy", "plain")["amiss"])
        assert "policy.yaml:6: tenants.trial.shadow" in gateway.get("policy", "plain")["amiss"]


def test_health_tells_of_release_classifier_and_counters(guarded: Guarded) -> None:
    told = guarded.get("health", "plain")
    assert told["not_ready"] is None
    inference, safety = told["services"]["inference"], told["services"]["safety"]
    assert (inference["about"]["adapter"], inference["about"]["sha256"]) == ("round-2", "a" * 64)
    assert (safety["about"]["model_id"], safety["about"]["threshold"]) == ("fake", 0.5)
    # Counters belong to the process, so other tests count too.
    released = REGISTRY.get_sample_value("fedward_gateway_characters_released_before_verdict_total")
    assert told["counters"]["released_before_verdict"] == [{"count": released}]
    assert "written" in {counter["result"] for counter in told["counters"]["audit_records"]}


def test_health_tells_what_does_not_answer(tmp_path: Path) -> None:
    with guarded_gateway(tmp_path, safety_url=closed_port()) as gateway:
        told = gateway.get("health", "plain")
        assert told["not_ready"].startswith("safety: ")
        assert told["services"]["safety"]["error"].startswith("safety: ")
        assert told["services"]["safety"]["about"] is None
        assert told["services"]["inference"]["error"] is None


def test_console_can_be_left_out(tmp_path: Path) -> None:
    with guarded_gateway(tmp_path, console=False) as gateway:
        for path in ("console", "console/main.js", "console/api/session"):
            answer = gateway.client.get(f"/{path}", headers=gateway.header("plain"))
            assert answer.status_code == 404
