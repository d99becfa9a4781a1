"""The inference service on a real socket: OpenAI's and Hugging Face's own clients, adapters under load, the command."""

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError

from services.contracts.adapters import file_sha256
from services.contracts.chat import ChatChunk, ChatCompletion
from services.inference.__main__ import main
from tests.fakes.model_servers import serving_inference, start_inference, wait_for_url
from tests.fakes.tiny_model import build_tiny_folder

ASK = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in ``tiny`` and two adapters in ``adapters/{r1,r2}``."""
    return build_tiny_folder(tmp_path_factory.mktemp("inference"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving_inference(folder / "tiny", adapters_dir=folder / "adapters") as url:
        yield url


def base_sha256(folder: Path) -> str:
    return file_sha256(folder / "tiny" / "model.safetensors")


def events(response: httpx.Response) -> list[Any]:
    return [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:") and "[DONE]" not in line]


# OpenAI


def test_openai_client_gets_an_answer(client: openai.OpenAI, folder: Path) -> None:
    answer = client.chat.completions.create(model="fedward", messages=ASK, max_tokens=12)  # type: ignore[arg-type]
    assert answer.choices[0].message.content
    assert (answer.choices[0].finish_reason, answer.model) == ("length", "tiny")
    assert answer.system_fingerprint == base_sha256(folder)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (15, 12, 27)


def test_openai_client_streams_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20)  # type: ignore[arg-type]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="tiny", messages=ASK, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_stream_follows_the_protocol_to_the_letter(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(ChatChunk.model_validate(chunk) for chunk in chunks)
    assert all("finish_reason" in chunk["choices"][0] and "usage" not in chunk for chunk in chunks)


def test_same_seed_gives_the_same_text_and_another_seed_another(http: httpx.Client) -> None:
    def text(seed: int) -> str:
        body = {"model": "tiny", "messages": ASK, "max_tokens": 16, "temperature": 1.0, "top_p": 0.95, "seed": seed}
        return str(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(text, [1, 2, 3, 1, 2, 3]))
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_stop_string_cuts_the_answer(http: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 16}
    free = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    stopped = http.post("/v1/chat/completions", json=body | {"stop": free[5]}).json()
    assert stopped["choices"][0]["message"]["content"] == free[: free.index(free[5])]
    assert stopped["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"model": "gpt"}, 404, "model_not_found", "model 'gpt' is not loaded; known: fedward, tiny"),
        ({"n": 2}, 400, "invalid_request", "n is 2, but one answer"),
        ({"messages": []}, 400, "invalid_request", "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request", "tools are not supported"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "invalid_request", "at most 4 strings"),
        ({"stop": ""}, 400, "invalid_request", "none of them empty"),
        (
            {"max_tokens": 120},
            400,
            "context_length_exceeded",
            "the prompt has 15 tokens and the answer may have 120, together 135; the model's context is 128 tokens",
        ),
        (
            {"messages": [{"role": "user", "content": "bread " * 300}]},
            400,
            "context_length_exceeded",
            "the model's context is 128 tokens",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_cannot_be_served_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], status: int, code: str, message: str, stream: bool
) -> None:
    body = {"model": "fedward", "messages": ASK, "stream": stream} | change
    response = http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert message in response.json()["error"]["message"]


def test_invalid_json_is_refused(http: httpx.Client) -> None:
    for route in ("/v1/chat/completions", "/v1/load_lora_adapter", "/v1/release"):
        response = http.post(route, content=b"{", headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["message"]) == (
            400,
            "the request body is not valid JSON",
        )


def test_huge_prompt_is_refused_before_it_is_encoded(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a" * 3_000_000}]}
    started = time.perf_counter()
    message = http.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert "tokens; the model's context is 128 tokens" in message
    assert message.startswith("the prompt has at least ")
    assert time.perf_counter() - started < 1


def test_failure_in_the_model_is_an_error_and_the_next_request_is_served(folder: Path) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 8}
    with serving_inference(folder / "tiny", failing=True) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def test_failure_in_a_stream_is_an_error_event_and_the_stream_ends(folder: Path) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 8, "stream": True}
    with (
        serving_inference(folder / "tiny", failing=True) as url,
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert "data: [DONE]" not in lines


def test_answer_without_a_limit_ends_with_the_context(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "bread " * 20}]}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == 128


def test_models_lists_the_served_name_and_the_base(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][:2] == ["fedward", "tiny"]


# TGI


def test_hugging_face_client_chats(url: str) -> None:
    client = InferenceClient(base_url=url)
    whole = client.chat_completion(ASK, max_tokens=12).choices[0].message.content
    chunks = client.chat_completion(ASK, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_hugging_face_client_names_an_adapter(url: str, http: httpx.Client) -> None:
    load(http, "r2")
    client = InferenceClient(base_url=url)
    answer = client.chat_completion(ASK, model="r2", max_tokens=40)
    assert answer.choices[0].message.content == text_of(http, "r2")[0]
    raw = InferenceClient(model=url)
    plain = raw.text_generation("How do I", max_new_tokens=12)
    assert raw.text_generation("How do I", max_new_tokens=12, adapter_id="r2") != plain
    http.post("/v1/unload_lora_adapter", json={"lora_name": "r2"})


def test_hugging_face_client_generates(url: str) -> None:
    client = InferenceClient(model=url)
    answer = client.text_generation("How do I", max_new_tokens=12, details=True)
    assert answer.details is not None
    assert (answer.details.finish_reason, answer.details.generated_tokens) == ("length", 12)
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
    streamed = list(client.text_generation("How do I", max_new_tokens=12, stream=True, details=True))
    assert "".join(event.token.text for event in streamed) == answer.generated_text
    assert streamed[-1].generated_text == answer.generated_text
    assert streamed[-1].details is not None
    assert streamed[-1].details.generated_tokens == 12
    assert "".join(client.text_generation("How do I", max_new_tokens=12, stream=True)) == answer.generated_text


def test_hugging_face_client_raises_its_own_errors(url: str, folder: Path) -> None:
    client = InferenceClient(model=url)
    for stream in (False, True):
        with pytest.raises(ValidationError, match="context is 128 tokens"):
            client.text_generation("How do I", max_new_tokens=500, stream=stream)
    with (
        serving_inference(folder / "tiny", max_batch=1, max_waiting=1) as busy,
        ThreadPoolExecutor(16) as pool,
    ):
        busy_client = InferenceClient(model=busy)
        calls = [pool.submit(busy_client.text_generation, "Hi", max_new_tokens=100) for _ in range(16)]
        errors = [call.exception() for call in calls]
    assert any(error is None for error in errors)
    refused = [error for error in errors if error is not None]
    assert refused
    assert all(isinstance(error, OverloadedError) for error in refused)


def test_generate_answers_in_tgi_terms(http: httpx.Client) -> None:
    body: dict[str, Any] = {"inputs": "How do I", "parameters": {"max_new_tokens": 5, "details": True}}
    plain = http.post("/generate", json=body)
    assert set(plain.json()) == {"generated_text", "details"}
    assert plain.json()["details"]["seed"] is None
    assert (plain.headers["x-prompt-tokens"], plain.headers["x-generated-tokens"]) == ("6", "5")
    assert http.post("/", json=body).json() == [plain.json()]
    full = http.post(
        "/generate", json={"inputs": "How do I", "parameters": {"max_new_tokens": 5, "return_full_text": True}}
    )
    assert full.json() == {"generated_text": "How do I" + plain.json()["generated_text"]}


def test_tgi_stop_sequence_stays_in_the_text(http: httpx.Client) -> None:
    body: dict[str, Any] = {"inputs": "How do I", "parameters": {"max_new_tokens": 16}}
    free = http.post("/generate", json=body).json()["generated_text"]
    body["parameters"] |= {"stop": [free[4]], "details": True}
    stopped = http.post("/generate", json=body).json()
    assert stopped["generated_text"] == free[: free.index(free[4]) + 1]
    assert stopped["details"]["finish_reason"] == "stop_sequence"


def test_tgi_sampling_draws_a_seed_and_reports_it(http: httpx.Client) -> None:
    parameters = {"max_new_tokens": 12, "do_sample": True, "details": True}
    drawn = http.post("/generate", json={"inputs": "How do I", "parameters": parameters}).json()
    parameters["seed"] = drawn["details"]["seed"]
    assert http.post("/generate", json={"inputs": "How do I", "parameters": parameters}).json() == drawn


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({}, "inputs: Field required"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens: Input should be greater"),
        ({"inputs": "x", "parameters": {"adapter_id": "r9"}}, "model 'r9' is not loaded"),
        ({"inputs": "x" * 500}, "the model's context is 128 tokens"),
    ],
)
def test_tgi_errors_have_tgi_bodies(http: httpx.Client, route: str, body: dict[str, Any], message: str) -> None:
    response = http.post(route, json=body)
    assert (response.status_code, set(response.json())) == (422, {"error", "error_type"})
    assert response.json()["error_type"] == "validation"
    assert message in response.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_failure_in_the_model_is_tgis_generation_error(folder: Path, stream: bool) -> None:
    with serving_inference(folder / "tiny", failing=True) as url:
        client = InferenceClient(model=url)
        with pytest.raises(GenerationError):
            list(client.text_generation("How do I", max_new_tokens=9, stream=stream))


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [(b"{", 422, "the request body is not valid JSON"), (b'{"inputs": "x", "parameters": 1}', 422, "parameters: ")],
)
def test_body_that_cannot_be_read_is_tgis_validation_error(
    http: httpx.Client, content: bytes, status: int, message: str
) -> None:
    response = http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error_type"]) == (status, "validation")
    assert response.json()["error"].startswith(message)


def test_info_names_the_model_and_its_limits(http: httpx.Client, folder: Path) -> None:
    info = http.get("/info").json()
    assert (info["model_id"], info["model_sha"]) == ("tiny", base_sha256(folder))
    assert (info["max_total_tokens"], info["max_input_tokens"]) == (128, 127)


# Adapters


def load(http: httpx.Client, name: str, path: str | None = None) -> str:
    response = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path or name})
    assert response.status_code == 200, response.text
    return str(response.json()["sha256"])


def text_of(http: httpx.Client, model: str) -> tuple[str, str]:
    """An answer's text and the hash of the weights that it says have written it."""
    body = {"model": model, "messages": ASK, "max_tokens": 40}
    answer = ChatCompletion.model_validate(http.post("/v1/chat/completions", json=body).raise_for_status().json())
    return str(answer.choices[0].message.content), str(answer.system_fingerprint)


def test_adapter_is_loaded_released_rolled_back_and_unloaded(http: httpx.Client, folder: Path) -> None:
    sha256 = load(http, "r1")
    assert sha256 == file_sha256(folder / "adapters" / "r1" / "adapter_model.safetensors")
    assert {"fedward", "tiny", "r1"} <= {model["id"] for model in http.get("/v1/models").json()["data"]}
    assert text_of(http, "r1")[0] != text_of(http, "tiny")[0]
    adapter_text = http.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "r1", "max_new_tokens": 8}})
    assert (
        adapter_text.json() != http.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 8}}).json()
    )
    activated = http.post("/v1/release", json={"lora_name": "r1", "sha256": sha256}).json()
    fields = {"served_model": "fedward", "adapter": "r1", "sha256": sha256, "previous": "tiny", "canary": None}
    assert activated == fields
    assert text_of(http, "fedward") == text_of(http, "r1")
    refused = http.post("/v1/unload_lora_adapter", json={"lora_name": "r1"})
    assert (refused.status_code, "active release" in refused.json()["error"]["message"]) == (400, True)
    rolled_back = http.post("/v1/release/rollback").json()
    assert rolled_back == fields | {"adapter": None, "sha256": None, "previous": None}
    assert rolled_back == http.get("/v1/release").json()
    assert text_of(http, "fedward")[1] == base_sha256(folder)
    assert http.post("/v1/release/rollback").status_code == 400
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "r1"}).json()["sha256"] == sha256


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"lora_name": "r1", "lora_path": "../tiny"}, 400, "lies outside the folder"),
        ({"lora_name": "r1", "lora_path": "nowhere"}, 400, "adapter_model.safetensors is missing"),
        ({"lora_name": "r1", "lora_path": "r1", "sha256": "0" * 64}, 409, "the request says 0000"),
        ({"lora_name": "a/b", "lora_path": "r1"}, 400, "lora_name: String should match"),
        ({"lora_name": "r1", "lora_path": "r1", "extra": 1}, 400, "extra: Extra inputs"),
    ],
)
def test_adapter_that_cannot_be_loaded_is_refused(
    http: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    response = http.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, message in response.json()["error"]["message"]) == (status, True), response.text


# Cancellation and shutdown


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_place(folder: Path, stream: bool) -> None:
    with serving_inference(folder / "tiny", max_batch=1) as url, httpx.Client(base_url=url, timeout=10) as http:
        before = generated_tokens(http)
        for _ in range(20):  # twenty answers of up to 110 tokens that nobody waits for
            leave_early(url, {"model": "tiny", "messages": ASK, "max_tokens": 110, "stream": stream})
        http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 1})
        assert generated_tokens(http) - before < 20 * 110 / 2


def generated_tokens(http: httpx.Client) -> float:
    found = re.search(r"^fedward_inference_generated_tokens_total (.+)$", http.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def leave_early(url: str, body: dict[str, Any]) -> None:
    """Send a request and close the connection without reading the answer."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.01)


def test_command_serves_a_release_and_finishes_what_it_began_at_sigterm(folder: Path) -> None:
    process = start_inference(folder, "--release", str(folder / "adapters" / "r1"))
    try:
        url = wait_for_url(process)
        assert httpx.get(f"{url}/health/ready", timeout=10).json() == {"status": "ready"}
        assert httpx.get(f"{url}/v1/release").json()["adapter"] == "r1"
        body = {"model": "fedward", "messages": ASK, "max_tokens": 110, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "/nowhere/model"], 2, "model /nowhere/model: there is no such folder"),
        (["--max-batch", "0"], 2, "max_batch: Input should be greater"),
        (["--device", "tpu"], 2, "device"),
        (["--release", "/nowhere/adapter"], 4, "adapter /nowhere/adapter: adapter_model.safetensors is missing"),
    ],
)
def test_command_that_cannot_start_says_why(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    assert main(["--model", str(folder / "tiny"), "--port", "0", *flags]) == code
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]


def test_model_that_the_hub_does_not_have_is_named(folder: Path) -> None:
    process = start_inference(
        folder, "--model", "no-such-org/no-such-model"
    )  # a process: the hub's library reads "offline" once
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("Traceback")) == (2, 0), errors
    assert "error: cannot load model no-such-org/no-such-model" in errors


def test_port_in_use_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start_inference(folder, "--port", str(port))
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, f"cannot listen on 127.0.0.1:{port}" in errors) == (2, True), errors
