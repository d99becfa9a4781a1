"""The model behind an OpenAI-compatible server: letters, failures and bounded concurrency, over a real socket."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.contracts.errors import UpstreamRejected, UpstreamUnavailable
from services.critique.backend import Text
from services.critique.openai_model import OpenAIModel
from services.critique.settings import CritiqueSettings
from tests.fakes.model_servers import serving

Result = TypeVar("Result")
Answer = Callable[[dict[str, Any]], Response]


class Server:
    """A chat server that answers as the test says, and counts what comes."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: message("")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        self.url = ""

    async def __call__(self, request: Request) -> Response:
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        await asyncio.sleep(0.005)
        self.busy -= 1
        return self.answer(body)


def message(text: str, finish: str = "stop", top: dict[str, float] | None = None) -> Response:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        choice["logprobs"] = {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}]}
    return JSONResponse({"choices": [choice]})


@pytest.fixture(scope="module")
def _running() -> Iterator[Server]:
    server = Server()
    routes = [
        Route("/v1/chat/completions", server.__call__, methods=["POST"]),
        Route("/v1/models", lambda request: JSONResponse({"data": []})),
    ]
    with serving(Starlette(routes=routes)) as url:
        server.url = url
        yield server


@pytest.fixture
def server(_running: Server) -> Server:
    _running.bodies.clear()
    _running.keys.clear()
    _running.busiest = 0
    return _running


def settings(url: str, **values: Any) -> CritiqueSettings:
    return CritiqueSettings(backend="openai", upstream_url=url, model="judge", **values)


def use(url: str, call: Callable[[OpenAIModel], Awaitable[Result]], **values: Any) -> Result:
    """Make one call with a model of its own."""

    async def run() -> Result:
        model = OpenAIModel(settings(url, **values))
        try:
            return await call(model)
        finally:
            await model.close()

    return asyncio.run(run())


def ask(server: Server, prompts: list[str], **values: Any) -> list[Text]:
    return use(server.url, lambda model: model.generate(prompts, 9), **values)


def test_texts_come_in_order_and_say_how_they_ended(server: Server) -> None:
    server.answer = lambda body: message(
        body["messages"][0]["content"].upper(), "length" if body["messages"][0]["content"] == "b" else "stop"
    )
    assert ask(server, ["a", "b", "c"]) == [("A", "end"), ("B", "cut_off"), ("C", "end")]
    assert server.bodies[0] | {"messages": 0} == {
        "model": "judge",
        "messages": 0,
        "temperature": 0,
        "seed": 0,
        "max_tokens": 9,
    }


def test_key_is_sent_and_concurrency_is_bounded(server: Server) -> None:
    server.answer = lambda body: message("x")
    ask(server, ["a"] * 20, upstream_concurrency=3, upstream_api_key="secret")
    assert server.busiest <= 3
    assert set(server.keys) == {"Bearer secret"}


@pytest.mark.parametrize("url", ["{}/v1", "{}/", "{}/v1/"])
def test_url_may_end_with_the_version(server: Server, url: str) -> None:
    server.answer = lambda body: message("x")
    assert use(url.format(server.url), lambda model: model.generate(["a"], 9)) == [("x", "end")]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        (message("B"), "B"),
        (message("Answer A is better."), "A"),
        (message("(B)"), "B"),
        (message("neither"), None),
        (message("An answer"), None),
        (message("A", top={"B": -0.1, "A": -2.0}), "B"),
        (message("x", top={" A": -1.0, "x": -0.1, "A": -3.0, "B": -2.0}), "A"),
        (message("B", top={"x": -0.1}), "B"),
        (message("B", top={}), "B"),
    ],
)
def test_letter_is_read_from_logprobs_or_text(server: Server, answer: Response, letter: str | None) -> None:
    server.answer = lambda body: answer
    assert use(server.url, lambda model: model.choose(["q"])) == [letter]


def test_passing_failure_is_tried_again(server: Server) -> None:
    def answer(body: dict[str, Any]) -> Response:
        return message("ok") if len(server.bodies) > 1 else JSONResponse({"error": "busy"}, status_code=503)

    server.answer = answer
    assert ask(server, ["a"]) == [("ok", "end")]


@pytest.mark.parametrize(
    ("answer", "error", "message_"),
    [
        (JSONResponse({}, status_code=500), UpstreamUnavailable, "critique model: HTTP 500"),
        (JSONResponse({"x": 1}), UpstreamUnavailable, "answered something unreadable: choices: Field required"),
        (JSONResponse({"choices": []}), UpstreamUnavailable, "answered without a choice"),
        (JSONResponse({}, status_code=404), UpstreamRejected, "critique model: HTTP 404"),
    ],
)
def test_lasting_failure_names_the_server(
    server: Server, answer: Response, error: type[Exception], message_: str
) -> None:
    server.answer = lambda body: answer
    with pytest.raises(error, match=message_):
        ask(server, ["a"])


def test_prompt_over_the_servers_context_is_too_long_by_itself(server: Server) -> None:
    too_long = JSONResponse({"error": {"message": "x", "code": "context_length_exceeded"}}, status_code=400)
    server.answer = lambda body: too_long if body["messages"][0]["content"] == "long" else message("ok")
    assert ask(server, ["long", "a"]) == [("", "too_long"), ("ok", "end")]
    assert use(server.url, lambda model: model.choose(["long"])) == [None]


def test_readiness_follows_the_server(server: Server) -> None:
    assert use(server.url, OpenAIModel.ready) is None
    assert "critique model" in str(use("http://127.0.0.1:9", OpenAIModel.ready))
