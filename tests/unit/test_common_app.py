"""What every HTTP process has in common, on a real socket: error bodies, limits, request ids, leaving."""

import asyncio
import gc
import json
import re
import socket
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY
from pydantic import BaseModel

from services.common.app import FEW_REQUESTS, TidyServer, create_app, route_with_errors
from services.common.connections import while_connected
from services.common.settings import Settings
from services.contracts.errors import ErrorBody, Overloaded, QuotaExceeded, Unauthorized
from tests.fakes.model_servers import serving

LIMIT = 100_000
JSON = {"content-type": "application/json"}
SECRET = "xylophonist"


class Body(BaseModel):
    """What the echo route takes."""

    text: str
    count: int = 0


def build() -> Any:
    app = create_app("test", Settings(body_limit_bytes=LIMIT), ready=None)

    @app.post("/echo")
    async def echo(body: Body) -> Body:
        return body

    @app.post("/bytes")
    async def read_bytes(body: dict[str, Any]) -> int:
        return len(body["text"].encode())

    @app.post("/busy")
    async def busy() -> None:
        raise Overloaded("no room")

    @app.post("/stranger")
    async def stranger() -> None:
        raise Unauthorized('the "token" has expired', error="invalid_token")

    @app.post("/spent")
    async def spent() -> None:
        raise QuotaExceeded("limit met", retry_after_seconds=17, headers={"x-ratelimit-remaining-requests": "0"})

    @app.post("/bug")
    async def bug(body: dict[str, Any]) -> None:
        Body.model_validate(body)

    @app.post("/slow")
    async def slow(request: Request) -> None:
        await while_connected(request.receive, asyncio.sleep(60))

    terse = route_with_errors(lambda error: JSONResponse({"terse": error.code}, status_code=error.http_status))
    router = APIRouter(route_class=terse)
    router.add_api_route("/terse", read_bytes, methods=["POST"])
    app.include_router(router)
    return app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build()) as url:
        yield url


def test_errors_bring_their_own_headers(url: str) -> None:
    answer = post(f"{url}/stranger", b"")
    assert answer.status_code == 401
    challenge = """Bearer realm="fedward", error="invalid_token", error_description="the 'token' has expired\""""
    assert answer.headers["www-authenticate"] == challenge
    assert answer.json()["error"]["code"] == "invalid_api_key"
    answer = post(f"{url}/spent", b"")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "17"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert post(f"{url}/busy", b"").headers["retry-after"] == "1"


def post(url: str, content: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    return httpx.post(url, content=content, headers=headers, timeout=20)


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b"{", JSON, "the request body is not valid JSON"),
        (b'{"text": "\xff"}', JSON, "the request body is not valid JSON"),
        (b"[" * 50_000 + b"]" * 50_000, JSON, "the request body is not valid JSON"),
        (b"[]", JSON, "body: Input should be a valid dictionary"),
        (b'{"text": "hi"}', {}, "body: not read as JSON; send it with the header 'content-type: application/json'"),
        (b"{}", JSON, "text: Field required"),
        (f'{{"text": "hi", "count": "{SECRET}"}}'.encode(), JSON, "count: Input should be a valid integer"),
    ],
)
def test_body_that_cannot_be_read_is_400_and_not_quoted(
    url: str, content: bytes, headers: dict[str, str], message: str
) -> None:
    response = post(f"{url}/echo", content, headers)
    assert response.status_code == 400
    assert ErrorBody.model_validate_json(response.content).error.message.startswith(message)
    assert SECRET not in response.text


def test_half_a_character_is_400(url: str) -> None:
    response = post(f"{url}/bytes", b'{"text": "\\ud800"}')
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    assert "half of a surrogate pair" in response.json()["error"]["message"]


def test_unknown_route_and_method_have_the_error_body_too(url: str) -> None:
    for response, status in ((httpx.get(f"{url}/nowhere"), 404), (httpx.get(f"{url}/echo"), 405)):
        assert response.status_code == status
        assert ErrorBody.model_validate_json(response.content).error.type == "invalid_request_error"


def test_overload_says_when_to_come_back(url: str) -> None:
    response = post(f"{url}/busy", b"")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")


def test_bug_is_500_without_details(url: str) -> None:
    response = post(f"{url}/bug", json.dumps({"text": 1, "x": SECRET}).encode())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    labels = {"service": "test", "route": "/bug", "status": "500"}
    assert REGISTRY.get_sample_value("fedward_requests_total", labels)
    assert SECRET not in response.text


def pieces(count: int) -> Iterator[bytes]:
    yield from (b" " * 10_000 for _ in range(count))


def test_body_up_to_the_limit_is_taken(url: str) -> None:
    body = b'{"text": "hi"}'
    assert post(f"{url}/echo", body.ljust(LIMIT)).status_code == 200
    assert httpx.post(f"{url}/echo", content=iter([body, *pieces(9)]), headers=JSON).status_code == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_oversized_body_is_413_also_for_a_client_that_sends_all_before_it_reads(url: str, size: int) -> None:
    assert_too_large(post(f"{url}/echo", b" " * size))
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(urllib.request.Request(f"{url}/echo", data=b" " * size, headers=JSON), timeout=20)
    with refusal.value as answer:
        assert answer.code == 413


def test_oversized_body_of_unknown_length_is_413(url: str) -> None:
    assert_too_large(httpx.post(f"{url}/echo", content=pieces(200), headers=JSON, timeout=20))


def assert_too_large(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "larger than 100000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b" " * (LIMIT + 1), 413, "body_too_large"),
        (b"{", 400, "invalid_request"),
        (b'{"text": "\xff"}', 400, "invalid_request"),
        (b'{"text": "\\ud800"}', 400, "invalid_request"),
    ],
)
def test_route_with_words_of_its_own_tells_every_refusal_in_them(
    url: str, content: bytes, status: int, code: str
) -> None:
    response = post(f"{url}/terse", content)
    assert (response.status_code, response.json()) == (status, {"terse": code})


def test_metrics_count_the_tasks_at_work(url: str) -> None:
    found = re.search(r"^fedward_asyncio_tasks (\S+)$", httpx.get(f"{url}/metrics").text, flags=re.MULTILINE)
    assert found
    assert float(found[1]) >= 1


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("", False), ("a" * 129, False)])
def test_request_id_is_the_callers_or_a_new_one(url: str, given: str, kept: bool) -> None:
    answered = httpx.get(f"{url}/health/live", headers={"x-request-id": given}).headers["x-request-id"]
    assert (answered == given) is kept
    assert answered


@pytest.mark.parametrize(("sent", "route"), [(b"content-length: 0", "/slow"), (b"content-length: 9", "unmatched")])
def test_client_that_leaves_ends_the_work_and_is_counted_as_such(url: str, sent: bytes, route: str) -> None:
    def left() -> float:
        labels = {"service": "test", "route": route, "status": "499"}
        return REGISTRY.get_sample_value("fedward_requests_total", labels) or 0

    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nhost: x\r\n" + sent + b"\r\n\r\n")
        time.sleep(0.05)
        assert left() == 0
    end = time.monotonic() + 10
    while not left():
        assert time.monotonic() < end, "the work went on"
        time.sleep(0.01)


@pytest.mark.parametrize(("at_work", "kept"), [(0, False), (FEW_REQUESTS, False), (FEW_REQUESTS + 1, True)])
def test_garbage_is_collected_while_few_requests_are_open(at_work: int, kept: bool) -> None:
    async def tick() -> bool:
        server = TidyServer(uvicorn.Config(FastAPI()))
        server.server_state.tasks = {asyncio.ensure_future(asyncio.sleep(0)) for _ in range(at_work)}
        circle = Circle()
        circle.itself = circle
        found = weakref.ref(circle)
        del circle
        await server.on_tick(601)
        assert found() is not None  # once a minute
        await server.on_tick(600)
        return found() is not None

    gc.disable()
    try:
        assert asyncio.run(tick()) is kept
    finally:
        gc.enable()


class Circle:
    itself: "Circle"
