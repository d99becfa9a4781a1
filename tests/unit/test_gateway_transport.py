"""The kept transport against real servers: what it sends, what it closes, and which errors it raises."""

import asyncio
import inspect
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest

from gateway import transport
from gateway.transport import fast_transport
from services.common.http import unavailable
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_upstreams import Fake, Reply, closed_port, raw_server, serving

PATIENCE = httpx.Timeout(5.0, pool=None)
HASTE = httpx.Timeout(5.0, read=0.1, pool=None)
CHAT = "/v1/chat/completions"
WHOLE = {"model": "fake", "stream": False}
STREAM = {"model": "fake", "stream": True}


class Echo(Fake):
    """Answers a body with itself, and ``/pieces`` piece by piece as the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.next_piece = threading.Semaphore(0)

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        if path == "/pieces":
            await reply.start()
            for i in range(3):
                while not self.next_piece.acquire(blocking=False):  # noqa: ASYNC110  (looks into another thread)
                    await asyncio.sleep(0.002)
                await reply.body(f"piece {i}".encode())
            await reply.body(b"", more=False)
        elif path == "/redirect":
            await reply.send({"type": "http.response.start", "status": 302, "headers": [(b"location", b"/echo")]})
            await reply.body(b"", more=False)
        elif path == "/cookie":
            headers = [(b"set-cookie", b"name=value; Path=/"), (b"content-type", b"application/json")]
            await reply.send({"type": "http.response.start", "status": 200, "headers": headers})
            await reply.body(b"{}", more=False)
        else:
            await reply.json(body)


@asynccontextmanager
async def client(url: str, patience: httpx.Timeout = PATIENCE) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, transport=fast_transport(), trust_env=False, timeout=patience) as made:
        yield made


def call(work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], url: str, **options: Any) -> Any:
    """Run ``work`` with a client of the transport."""

    async def run() -> Any:
        async with client(url, **options) as made:
            return await work(made)

    return asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (looks into another thread)
            await asyncio.sleep(0.005)


def test_many_calls_one_after_the_other_and_at_once_are_each_answered_with_their_own_body() -> None:
    async def work(made: httpx.AsyncClient) -> None:
        async def echo(i: int) -> None:
            answer = await made.post("/echo", json={"number": i, "text": "x" * (i % 64 * 50)})
            assert answer.json() == {"number": i, "text": "x" * (i % 64 * 50)}

        for i in range(1000):
            await echo(i)
        await asyncio.gather(*(echo(i) for i in range(64)))

    with serving(Echo()) as url:
        call(work, url)


def test_idle_connection_is_used_again() -> None:
    ports = set[Any]()

    class Ports(Echo):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            ports.add(scope.get("client"))
            await super().__call__(scope, receive, send)

    async def work(made: httpx.AsyncClient) -> None:
        for _ in range(20):
            assert (await made.post("/echo", json={})).status_code == 200
            async with made.stream("POST", "/echo", json={}) as response:
                assert b"".join([piece async for piece in response.aiter_bytes()]) == b"{}"

    with serving(Ports()) as url:
        call(work, url)
    assert len(ports - {None}) == 1


def test_body_streams_as_it_comes() -> None:
    echo = Echo()

    async def work(made: httpx.AsyncClient) -> list[bytes]:
        seen = []
        async with made.stream("POST", "/pieces", json={}) as response:
            echo.next_piece.release()
            async for piece in response.aiter_bytes():
                seen.append(piece)  # the server sends the next one only after this one was seen
                echo.next_piece.release()
        return seen

    with serving(echo) as url:
        assert call(work, url) == [b"piece 0", b"piece 1", b"piece 2"]


@pytest.mark.parametrize("leave", ["break", "cancel", "error"])
def test_answer_that_is_left_early_is_a_disconnect_for_the_server(leave: str) -> None:
    model = FakeInference(pieces=["word "] * 50, pause=lambda i: 0.0 if i < 3 else 60.0)

    async def read(made: httpx.AsyncClient) -> None:
        async with made.stream("POST", CHAT, json=STREAM) as response:
            async for piece in response.aiter_bytes():
                if b"word" in piece and leave != "cancel":
                    break
            if leave == "error":
                raise ValueError

    async def work(made: httpx.AsyncClient) -> None:
        task = asyncio.create_task(read(made))
        if leave == "cancel":
            await until(lambda: model.at_work == 1)
            task.cancel()
        await asyncio.wait((task,))
        await until(lambda: model.cancelled == 1)  # before the client is closed

    with serving(model) as url:
        call(work, url)


@pytest.mark.parametrize("cancellations", [1, 2, 3])
def test_call_cancelled_while_it_waits_for_the_head_is_a_disconnect_for_the_server(cancellations: int) -> None:
    model = FakeInference(fault="hang")

    async def work(made: httpx.AsyncClient) -> None:
        task = asyncio.create_task(made.post(CHAT, json=WHOLE))
        await until(lambda: model.at_work == 1)
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: model.cancelled == 1)

    with serving(model) as url:
        call(work, url)


def test_read_timeout_holds_for_the_head_and_closes_the_connection() -> None:
    model = FakeInference(fault="hang")

    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadTimeout) as caught:
            await made.post(CHAT, json=WHOLE)
        assert caught.value.request.url.path == CHAT
        assert unavailable("inference", caught.value).message == "inference: no answer within the deadline"
        await until(lambda: model.cancelled == 1)

    with serving(model) as url:
        call(work, url, patience=HASTE)


def test_read_timeout_holds_for_every_piece_and_closes_the_connection() -> None:
    model = FakeInference(pieces=["word "] * 9, fault="hang", fault_at=3)

    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadTimeout):
            async with made.stream("POST", CHAT, json=STREAM) as response:
                assert b"word" in b"".join([piece async for piece in response.aiter_bytes()])
        await until(lambda: model.cancelled == 1)

    with serving(model) as url:
        call(work, url, patience=HASTE)


def test_connect_timeout_is_ours_to_set() -> None:
    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ConnectTimeout) as caught:
            await made.post("/")
        assert unavailable("safety", caught.value).message == "safety: no answer within the deadline"

    with socket.socket() as full:  # one that accepts nobody: its queue holds one connection, and that is taken
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with socket.socket() as first, socket.socket() as second:
            for taker in (first, second):
                taker.setblocking(False)
                taker.connect_ex(address)
            call(work, f"http://127.0.0.1:{address[1]}", patience=httpx.Timeout(5.0, connect=0.1, pool=None))


def test_refused_connection_is_a_connect_error() -> None:
    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ConnectError) as caught:
            await made.post("/", content=b"{}")
        assert unavailable("safety", caught.value).message == "safety: cannot be reached"

    call(work, closed_port())


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 2",
        b"no protocol that anybody knows\r\n\r\n",
        HEAD + b"content-length: 100\r\n\r\n{",
        HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nab",
        HEAD + b"transfer-encoding: chunked\r\n\r\nno number\r\n",
    ],
    ids=["nothing", "half a head", "no HTTP", "body too short", "chunk cut off", "bad chunk"],
)
def test_broken_answer_is_a_request_error(answer: bytes) -> None:
    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RequestError) as caught:
            await made.post("/", content=b"{}")
        assert unavailable("safety", caught.value).message == "safety: the connection broke"

    with raw_server(answer) as url:
        call(work, url)


def test_connection_reset_in_the_middle_of_a_stream_is_a_request_error() -> None:
    model = FakeInference(pieces=["word "] * 9, fault="reset", fault_at=3)

    async def work(made: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.RequestError) as caught:
            await made.post(CHAT, json=STREAM)
        assert unavailable("inference", caught.value).message == "inference: the connection broke"

    with serving(model) as url:
        call(work, url)


def test_every_error_of_aiohttp_becomes_one_of_httpx() -> None:
    """Those that a call with our settings can raise: no WebSocket, no redirect, no upload that is watched."""
    elsewhere = ("WS", "Redirect", "ContentType", "UploadAborted")
    found = [
        cls
        for name, cls in vars(aiohttp.client_exceptions).items()
        if inspect.isclass(cls) and issubclass(cls, Exception) and not any(word in name for word in elsewhere)
        if cls.__module__ == aiohttp.client_exceptions.__name__
    ]
    assert len(found) > 15
    request = httpx.Request("POST", "http://127.0.0.1/")
    for cls in found:
        with pytest.raises(httpx.RequestError), transport._errors_of(request):
            raise cls.__new__(cls)


def test_neither_cookies_nor_redirects_are_followed() -> None:
    async def work(made: httpx.AsyncClient) -> None:
        assert (await made.post("/redirect", json={})).status_code == 302
        session: Any = made._transport
        await made.post("/cookie", json={})
        assert len(session._session.cookie_jar) == 0

    with serving(Echo()) as url:
        call(work, url)


def test_without_a_client_only_the_headers_that_were_given_are_sent() -> None:
    async def run(url: str) -> bytes:
        request = httpx.Request(
            "POST", f"{url}/v1/classify?a=%20b", content=b"{}", headers={"content-type": "application/json"}
        )
        async with fast_transport() as made:
            response = await made.handle_async_request(request)
            return await response.aread()

    received: list[bytes] = []
    with raw_server(HEAD + b"content-length: 2\r\n\r\n[]", received=received) as url:
        assert asyncio.run(run(url)) == b"[]"
    head, body = received[0].split(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "post /v1/classify?a=%20b http/1.1"
    host = url.removeprefix("http://")
    assert sorted(lines[1:]) == sorted([f"host: {host}", "content-length: 2", "content-type: application/json"])
    assert body == b"{}"


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    monkeypatch.delenv("NO_PROXY", raising=False)

    async def work(made: httpx.AsyncClient) -> int:
        return (await made.post("/echo", json={})).status_code

    with serving(Echo()) as url:
        assert call(work, url) == 200


def test_closing_a_transport_that_was_never_used_is_fine() -> None:
    asyncio.run(fast_transport().aclose())
