"""Releases: swapping and canaries under load, and the release command on this service, on vLLM's API and on TGI's."""

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.contracts.adapters import CONFIG
from services.inference.__main__ import main
from tests.fakes.model_servers import serving, serving_inference
from tests.fakes.tiny_model import build_tiny_adapter, build_tiny_folder
from tests.fakes.vllm_server import FakeVllm

ASK = [{"role": "user", "content": "How do I bake bread?"}]
PROMPT = "How do I bake"
Shas = dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in ``tiny`` and two adapters in ``adapters/{r1,r2}``."""
    return build_tiny_folder(tmp_path_factory.mktemp("release"), pinned=True)


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    with serving_inference(folder / "tiny", adapters_dir=folder / "adapters") as url:
        yield url


@pytest.fixture
def shas(http: httpx.Client) -> Shas:
    """Both adapters, loaded: their hashes by name."""
    return {name: load(http, name, name) for name in ("r1", "r2")}


def load(http: httpx.Client, name: str, path: str) -> str:
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}).raise_for_status()
    return str(answer.json()["sha256"])


# Ways to ask: each gives the text, and the hash of the weights that the answer names.


def ask_chat(http: httpx.Client, model: str, **headers: str) -> tuple[str, str]:
    body = {"model": model, "messages": ASK, "max_tokens": 24}
    answer = http.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
    assert answer.headers["x-fedward-adapter-sha256"] == answer.json()["system_fingerprint"]
    return answer.json()["choices"][0]["message"]["content"], answer.json()["system_fingerprint"]


def ask_chat_stream(http: httpx.Client, model: str, **headers: str) -> tuple[str, str]:
    body = {"model": model, "messages": ASK, "max_tokens": 24, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    (fingerprint,) = {chunk["system_fingerprint"] for chunk in chunks}
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), fingerprint


def ask_completion(http: httpx.Client, model: str, **headers: str) -> tuple[str, str]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24}
    answer = http.post("/v1/completions", json=body, headers=headers).raise_for_status()
    return answer.json()["choices"][0]["text"], answer.json()["system_fingerprint"]


def ask_tgi_stream(http: httpx.Client, model: str, **headers: str) -> tuple[str, str]:
    parameters = {"max_new_tokens": 24} | ({} if model == "fedward" else {"adapter_id": model})
    body = {"inputs": PROMPT, "parameters": parameters}
    with http.stream("POST", "/generate_stream", json=body, headers=headers) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events)
    return events[-1]["generated_text"], response.headers["x-fedward-adapter-sha256"]


WAYS = (ask_chat, ask_chat_stream, ask_completion, ask_tgi_stream)
Seen = tuple[int, str, str]


class Load:
    """Clients that ask in every way, all the time; what they saw is in ``seen`` as (way, text, hash)."""

    def __init__(self, url: str, model: str) -> None:
        self.seen: list[Seen] = []
        self._url, self._model = url, model
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(6)
        self._clients: list[Future[None]] = []

    def __enter__(self) -> "Load":
        self._clients = [self._pool.submit(self._ask, number) for number in range(6)]
        return self

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as http:
            while not self._over.is_set():
                way = number % len(WAYS)
                self.seen.append((way, *WAYS[way](http, self._model)))
                number += 1

    def wait_for_a_turn(self) -> None:
        """Wait until some client has asked and been answered since now: there are more answers than clients."""
        enough = len(self.seen) + len(self._clients) + 1
        while len(self.seen) < enough and not any(client.done() for client in self._clients):
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()  # raises what a client met with


def test_hundred_swaps_under_load_never_mix_adapters(url: str, http: httpx.Client, shas: Shas) -> None:
    """Releases and rollbacks, canaries, and weights replaced under their name: each answer is wholly one adapter's."""
    wanted = {(way, shas[name]): WAYS[way](http, name)[0] for name in shas for way in range(len(WAYS))}
    assert all(wanted[way, shas["r1"]] != wanted[way, shas["r2"]] for way in range(len(WAYS)))
    http.post("/v1/release", json={"lora_name": "r1", "sha256": shas["r1"]}).raise_for_status()
    load(http, "now", "r1")
    rng = random.Random(0)
    with Load(url, "fedward") as released, Load(url, "now") as named:
        for swap in range(100):
            name = ("r2", "r1")[swap % 2]
            body = {"lora_name": name, "sha256": shas[name]}
            if rng.random() < 0.3:
                http.post("/v1/release/canary", json=body | {"percent": 50}).raise_for_status()
            http.post("/v1/release", json=body).raise_for_status()
            if rng.random() < 0.2:
                http.post("/v1/release/rollback").raise_for_status()
                http.post("/v1/release", json=body).raise_for_status()
            load(http, "now", name)
            if swap % 25 == 0:  # on both adapters in turn; else clients in step with the swaps may see only one
                released.wait_for_a_turn()
                named.wait_for_a_turn()
    for seen in (released.seen, named.seen):
        assert len({sha256 for _, _, sha256 in seen}) == 2
        assert {way for way, _, _ in seen} == set(range(len(WAYS)))
        strays = [(way, text, sha256) for way, text, sha256 in seen if text != wanted[way, sha256]]
        assert not strays, (strays, wanted)


def test_canary_answers_its_share_and_the_same_requests_each_time(http: httpx.Client, shas: Shas) -> None:
    http.post("/v1/release", json={"lora_name": "r1", "sha256": shas["r1"]})
    release = http.post("/v1/release/canary", json={"lora_name": "r2", "sha256": shas["r2"], "percent": 25}).json()
    assert release["canary"] == {"adapter": "r2", "sha256": shas["r2"], "percent": 25}
    assert release["adapter"] == "r1"

    def chosen(way: Any, model: str = "fedward") -> list[str]:
        return [way(http, model, **{"x-request-id": f"request-{n}"})[1] for n in range(20)]

    sides = chosen(ask_completion)
    assert chosen(ask_tgi_stream) == sides
    assert 1 <= sides.count(shas["r2"]) <= 10
    assert set(chosen(ask_completion, "r1")) == {shas["r1"]}
    wider = http.post("/v1/release/canary", json={"lora_name": "r2", "sha256": shas["r2"], "percent": 60}).json()
    assert wider["canary"]["percent"] == 60
    assert all(now == shas["r2"] for now, before in zip(chosen(ask_completion), sides, strict=True) if before != now)


def test_seed_decides_where_there_is_no_request_id(http: httpx.Client, shas: Shas) -> None:
    http.post("/v1/release", json={"lora_name": "r1", "sha256": shas["r1"]})
    http.post("/v1/release/canary", json={"lora_name": "r2", "sha256": shas["r2"], "percent": 50})

    def side(seed: int, model: str = "fedward") -> str:
        body = {"model": model, "prompt": "x", "max_tokens": 1, "seed": seed}
        return str(http.post("/v1/completions", json=body).json()["system_fingerprint"])

    sides = [side(seed) for seed in range(16)]
    assert sides == [side(seed) for seed in range(16)]
    assert set(sides) == set(shas.values())


def test_canary_is_promoted_or_rolled_back_at_once(http: httpx.Client, shas: Shas) -> None:
    def canary() -> httpx.Response:
        return http.post("/v1/release/canary", json={"lora_name": "r2", "sha256": shas["r2"], "percent": 100})

    http.post("/v1/release", json={"lora_name": "r1", "sha256": shas["r1"]})
    canary()
    assert ask_chat(http, "fedward")[1] == shas["r2"]
    refused = http.post("/v1/unload_lora_adapter", json={"lora_name": "r2"})
    assert (refused.status_code, "is the canary" in refused.json()["error"]["message"]) == (400, True)
    rolled_back = http.post("/v1/release/rollback").json()
    assert (rolled_back["adapter"], rolled_back["canary"], rolled_back["previous"]) == ("r1", None, "tiny")
    assert ask_chat(http, "fedward")[1] == shas["r1"]
    canary()
    promoted = http.post("/v1/release", json={"lora_name": "r2", "sha256": shas["r2"]}).json()
    assert (promoted["adapter"], promoted["canary"], promoted["previous"]) == ("r2", None, "r1")
    again = canary()
    assert (again.status_code, "active release" in again.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("change", "status"),
    [({"percent": 0}, 400), ({"percent": 101}, 400), ({"lora_name": "r9"}, 404), ({"sha256": "0" * 64}, 409)],
)
def test_canary_that_cannot_be_is_refused(http: httpx.Client, shas: Shas, change: dict[str, Any], status: int) -> None:
    body = {"lora_name": "r2", "sha256": shas["r2"], "percent": 5} | change
    assert http.post("/v1/release/canary", json=body).status_code == status
    assert http.get("/v1/release").json()["canary"] is None


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 800}, {"target_modules": ["q_proj", "v_proj", "k_proj"]}, {"r": 2}, {"use_rslora": True}]
)
def test_adapter_whose_configuration_was_changed_is_refused(
    http: httpx.Client, folder: Path, change: dict[str, Any]
) -> None:
    adapter = folder / "adapters" / "changed"
    sha256 = build_tiny_adapter(adapter, folder / "tiny", seed=3, pinned=True)
    assert load(http, "changed", "changed") == sha256
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))
    response = http.post("/v1/load_lora_adapter", json={"lora_name": "changed", "lora_path": "changed"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_hash_mismatch")
    assert "adapter_config.json has sha256" in response.json()["error"]["message"]


# The release command


def release(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> dict[str, Any]:
    """The release after ``python -m services.inference release ...``."""
    code = main(["release", *arguments, "--url", url])
    output = capsys.readouterr()
    assert code == 0, output.err
    shown: dict[str, Any] = json.loads(output.out[output.out.index("\n{") if "\n{" in output.out else 0 :])
    return shown


def refusal(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> str:
    """What the command says when it does not do it."""
    assert main(["release", *arguments, "--url", url]) != 0
    return capsys.readouterr().err


def test_command_releases_on_this_service(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r1, r2 = (str(folder / "adapters" / name) for name in ("r1", "r2"))
    assert release(capsys, url, "load", "--name", "r1", "--path", r1)["adapter"] is None
    assert release(capsys, url, "activate", "--name", "r1")["adapter"] == "r1"
    canary = release(capsys, url, "canary", "--name", "r2", "--path", r2, "--percent", "5")
    assert (canary["adapter"], canary["canary"]["adapter"], canary["canary"]["percent"]) == ("r1", "r2", 5)
    assert release(capsys, url, "rollback")["canary"] is None
    assert release(capsys, url, "activate", "--name", "r2")["previous"] == "r1"
    assert release(capsys, url, "rollback")["adapter"] == "r1"
    assert release(capsys, url, "status")["adapter"] == "r1"
    assert "r2 is loaded with sha256" in refusal(capsys, url, "activate", "--name", "r2", "--sha256", "0" * 64)
    assert "r9" in refusal(capsys, url, "activate", "--name", "r9")
    assert "lora_name" in refusal(capsys, url, "load", "--name", "a/b", "--path", r1)


@pytest.mark.parametrize("inplace", [True, False])
def test_command_releases_on_vllm(folder: Path, capsys: pytest.CaptureFixture[str], inplace: bool) -> None:
    vllm = FakeVllm(inplace=inplace)
    r1, r2 = (str((folder / "adapters" / name).resolve()) for name in ("r1", "r2"))
    with serving(vllm.app) as url:
        assert release(capsys, url, "status") == {
            "served_model": "fedward", "adapter": None, "sha256": None, "previous": None, "canary": None
        }  # fmt: skip
        release(capsys, url, "load", "--name", "r1", "--path", r1)
        assert vllm.calls == [("load", {"lora_name": "r1", "lora_path": r1})]
        first = release(capsys, url, "activate", "--name", "r1")
        assert (first["adapter"], first["previous"], len(first["sha256"])) == ("r1", None, 64)
        second = release(capsys, url, "activate", "--name", "r2", "--path", r2, "--served", "fedward")
        assert (second["adapter"], second["previous"]) == ("r2", "r1")
        assert vllm.loaded == {"r1": r1, "fedward": r2, "r2": r2, "fedward-previous": r1}
        assert release(capsys, url, "activate", "--name", "r2")["previous"] == "r1"  # doing it again changes nothing
        back = release(capsys, url, "rollback")
        assert (back["adapter"], back["previous"]) == ("r1", None)
        assert "no earlier release" in refusal(capsys, url, "rollback")
        assert "cannot divide the requests" in refusal(capsys, url, "canary", "--name", "r2", "--percent", "5")
        assert "vLLM has not loaded r9; give --path" in refusal(capsys, url, "activate", "--name", "r9")
        wrong = refusal(capsys, url, "activate", "--name", "r2", "--sha256", "0" * 64)
        assert "but the request says 0000" in wrong
        assert vllm.loaded["fedward"] == r1


def test_adapter_that_vllm_cannot_read_leaves_the_release(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = FakeVllm(inplace=False)
    r1, broken = str((folder / "adapters" / "r1").resolve()), tmp_path / "broken"
    build_tiny_adapter(broken, folder / "tiny", seed=4)
    (broken / "unreadable").touch()
    with serving(vllm.app) as url:
        release(capsys, url, "activate", "--name", "r1", "--path", r1)
        message = refusal(capsys, url, "activate", "--name", "broken", "--path", str(broken))
        assert "vLLM: HTTP 404 from /v1/load_lora_adapter for broken: No adapter found" in message
        refusal(capsys, url, "load", "--name", "fedward", "--path", str(broken))
    assert vllm.loaded == {"r1": r1, "fedward": r1}


def test_vllm_without_runtime_updating_is_told_from_a_missing_adapter(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeVllm(updating=False).app) as url:
        message = refusal(capsys, url, "load", "--name", "r1", "--path", str(folder / "adapters" / "r1"))
    assert "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in message


def test_command_says_what_to_do_on_tgi(capsys: pytest.CaptureFixture[str]) -> None:
    tgi = FastAPI()
    tgi.get("/info")(lambda: {"model_id": "org/base", "max_total_tokens": 4096, "router": "text-generation-router"})
    with serving(tgi) as url:
        assert release(capsys, url, "status")["served_model"] == "org/base"
        message = refusal(capsys, url, "activate", "--name", "r1", "--path", "/adapters/r1")
        assert "restart it with LORA_ADAPTERS=r1=/adapters/r1" in message
        assert "adapter_id=r1" in message
        assert "LORA_ADAPTERS" in refusal(capsys, url, "canary", "--name", "r1", "--percent", "1")
        assert "LORA_ADAPTERS" in refusal(capsys, url, "rollback")


def test_other_servers_and_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FastAPI()) as url:
        assert "is neither Fedward's inference service nor vLLM nor TGI" in refusal(capsys, url, "status")
    assert "cannot be reached" in refusal(capsys, url, "status")
    assert "--percent is 0" in refusal(capsys, url, "canary", "--name", "r1", "--percent", "0")
    with pytest.raises(SystemExit):
        main(["release", "canary", "--name", "r1"])
    assert "canary needs --percent" in capsys.readouterr().err
