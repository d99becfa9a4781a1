"""Traces of real processes as a collector gets them: one trace for each request, and no text in it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import chat_body
from tests.fakes.gateway_upstreams import serving
from tests.fakes.model_servers import wait_for_url
from tests.fakes.otlp_receiver import OtlpReceiver, Received, otlp_receiver
from tests.meta.test_import_layers import ROOT

SERVER, CLIENT, INTERNAL = 2, 3, 1
PROMPT, ANSWER = "Which rivers are long?", "Several are."
BUG = """
import sys
from services.common.app import create_app, serve
from services.common.settings import Settings
settings = Settings(port=0, otlp_endpoint=sys.argv[1])
app = create_app("buggy", settings)
@app.get("/bug")
def bug() -> None:
    raise ValueError("this quotes a prompt")
serve(app, settings, "buggy")
"""


@contextmanager
def running(*command: str, cwd: Path) -> Iterator[str]:
    """A process; gives its URL. At its end it has sent its spans."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield wait_for_url(process)
    finally:
        process.terminate()
        process.communicate(timeout=20)


class Collected(NamedTuple):
    """What a collector got, and the ``traceparent`` with which the model was asked, by kind of request."""

    receiver: OtlpReceiver
    parents: dict[str, str]

    def spans(self, request: str) -> list[Received]:
        trace_id = bytes.fromhex(self.parents[request].split("-")[1])
        return [span for span in self.receiver.spans() if span.trace_id == trace_id]

    def one(self, request: str, name: str) -> Received:
        [span] = [span for span in self.spans(request) if span.name == name]
        return span


REQUESTS: dict[str, dict[str, Any]] = {"whole": {}, "stream": {"stream": True}, "refused": {"model": "other"}}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """A gateway and a safety service in processes of their own, asked three times, and ended."""
    folder, model, parents = tmp_path_factory.mktemp("traced"), FakeInference(pieces=[ANSWER], usage=True), {}
    with otlp_receiver() as receiver, ExitStack() as exits:
        told = ("--port", "0", "--otlp-endpoint", receiver.url)
        inference_url = exits.enter_context(serving(model))
        safety_url = exits.enter_context(running("-m", "services.safety", *told, "--tier", "ngram", cwd=folder))
        places = ("--inference-url", inference_url, "--safety-url", safety_url)
        patient = ("--check-deadline-ms", "5000", "--served-model-name", "fake", "--allowed-models", '["other"]')
        url = exits.enter_context(running("-m", "gateway", *told, *places, *patient, cwd=folder))
        for name, fields in REQUESTS.items():
            body = chat_body(messages=[{"role": "user", "content": PROMPT}], **fields)
            status = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).status_code
            assert status == (404 if name == "refused" else 200)
            parents[name] = model.headers["traceparent"]
        exits.close()
        return Collected(receiver, parents)


def test_each_request_is_one_trace_and_probes_are_none(collected: Collected) -> None:
    ids = {span.trace_id for span in collected.receiver.spans()}
    assert ids == {bytes.fromhex(parent.split("-")[1]) for parent in collected.parents.values()}
    assert len(ids) == len(REQUESTS)


@pytest.mark.parametrize("request_name", ["whole", "stream"])
def test_spans_of_all_processes_hang_together(collected: Collected, request_name: str) -> None:
    spans = collected.spans(request_name)
    [root] = [span for span in spans if not span.parent_id]
    assert (root.service, root.name, root.kind) == ("fedward-gateway", "POST /v1/chat/completions", SERVER)
    generation = collected.one(request_name, "chat fake")
    assert (generation.kind, generation.parent_id) == (CLIENT, root.id)
    assert generation.id.hex() == collected.parents[request_name].split("-")[2]
    checks = {span.id: span for span in spans if span.name == "check"}
    assert [check.kind for check in checks.values()] == [INTERNAL] * len(checks)
    calls = {span.id: span for span in spans if span.name == "POST /v1/classify" and span.kind == CLIENT}
    assert {call.parent_id for call in calls.values()} <= checks.keys()  # one call may serve several checks
    assert 2 <= len(calls) <= len(checks)
    answers = [span for span in spans if span.service == "fedward-safety"]
    assert {answer.parent_id for answer in answers} == calls.keys()
    assert all((span.name, span.kind) == ("POST /v1/classify", SERVER) for span in answers)
    assert not any(span.failed for span in spans)


@pytest.mark.parametrize("request_name", ["whole", "stream"])
def test_generation_is_told_by_the_conventions(collected: Collected, request_name: str) -> None:
    attributes = collected.one(request_name, "chat fake").attributes
    assert attributes.pop("server.port") > 0
    assert attributes.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fedward",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "fedward.adapter_sha256": "ad" * 32,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "server.address": "127.0.0.1",
    }


def test_checks_tell_what_was_decided(collected: Collected) -> None:
    checks = [span.attributes for span in collected.spans("whole") if span.name == "check"]
    told = {"fedward.action": "allow", "fedward.categories": []}
    assert sorted(checks, key=lambda told: str(told["fedward.direction"])) == [
        told | {"fedward.direction": direction} for direction in ("prompt", "response")
    ]


def test_refused_generation_is_an_error_by_name(collected: Collected) -> None:
    span = collected.one("refused", "chat other")
    assert span.failed
    assert span.attributes["error.type"] == "PassedOn"


def test_no_text_is_told(collected: Collected, tmp_path: Path) -> None:
    sent = b"".join(collected.receiver.raw)
    assert PROMPT.encode() not in sent
    assert ANSWER.encode() not in sent
    with otlp_receiver() as receiver:
        with running("-c", BUG, receiver.url, cwd=tmp_path) as url:
            assert httpx.get(f"{url}/bug").status_code == 500
        [span] = receiver.spans()
    assert span.failed
    assert b"prompt" not in b"".join(receiver.raw)


def test_gateway_without_a_collector_does_not_load_opentelemetry() -> None:
    code = "import sys, gateway.app; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
