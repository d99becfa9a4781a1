"""Limits on a request's head, on a real server: size, number of headers, and time."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from services.common.request_head import HEAD_LIMIT, HEADER_COUNT, BoundedHead

START = b"POST /path HTTP/1.1\r\nhost: here\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = f"{len(scope['headers'])} headers, {len(body)} bytes".encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none", http=BoundedHead)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=10)


def talk(port: int, *parts: bytes) -> bytes:
    """Send the parts; returns all that comes back until the server has answered or closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # the server has closed already
                break
        answer = b""
        try:
            while not answer.endswith((b"bytes", b"}}")) and (data := connection.recv(65536)):
                answer += data
        except ConnectionResetError:
            pass
        return answer


def refusal(answer: bytes) -> str:
    assert answer.startswith(b"HTTP/1.1 431 ")
    message: str = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]
    return message


def test_requests_within_the_limits_pass(port: int) -> None:
    large = b"x: " + b"a" * (HEAD_LIMIT - 1000) + b"\r\n"
    assert talk(port, START + large + b"content-length: 3\r\n\r\nabc").endswith(b"3 headers, 3 bytes")
    many = b"".join(b"x%d: 1\r\n" % i for i in range(HEADER_COUNT - 1))
    assert talk(port, START + many + b"\r\n").endswith(b"100 headers, 0 bytes")


def test_large_bodies_are_no_matter_of_the_head(port: int) -> None:
    body = b"b" * 3_000_000
    request = START + b"content-length: 3000000\r\n\r\n"
    assert talk(port, request + body).endswith(b"2 headers, 3000000 bytes")
    assert talk(port, request, body).endswith(b"2 headers, 3000000 bytes")


@pytest.mark.parametrize("size", [HEAD_LIMIT, 1_000_000, 20_000_000])
def test_head_that_is_too_large_is_refused(port: int, size: int) -> None:
    answer = talk(port, START + b"x: ", b"a" * size, b"\r\n\r\n")
    if answer:  # a client that still sends when the answer comes may see a reset instead
        assert "larger than 65536 bytes" in refusal(answer)
    assert b" 200 " not in answer


def test_head_that_comes_in_pieces_is_refused_as_soon_as_it_is_too_large(port: int) -> None:
    answer = talk(port, START, *([b"x: " + b"a" * 8000 + b"\r\n"] * 40))  # and never ends
    assert not answer or "larger than" in refusal(answer)


def test_too_many_headers_are_refused(port: int) -> None:
    many = b"".join(b"x%d: 1\r\n" % i for i in range(HEADER_COUNT))
    assert "more than 100 headers" in refusal(talk(port, START + many + b"\r\n"))


def test_long_url_counts(port: int) -> None:
    answer = talk(port, b"GET /" + b"a" * HEAD_LIMIT + b" HTTP/1.1\r\nhost: here\r\n\r\n")
    assert "larger than" in refusal(answer)


def test_other_nonsense_is_answered_as_before(port: int) -> None:
    assert talk(port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_each_request_of_a_connection_is_measured_for_itself(port: int) -> None:
    half = b"x: " + b"a" * (HEAD_LIMIT // 2 + 1000) + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(4):
            connection.sendall(START + half)
            answer = b""
            while not answer.endswith(b"bytes"):
                answer += connection.recv(65536)
            assert b"2 headers, 0 bytes" in answer


def test_slow_head_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.request_head.HEAD_SECONDS", 0.4)
    assert talk(port) == b""
    assert talk(port, START) == b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:  # also the second one
        connection.sendall(START + b"\r\n")
        assert connection.recv(65536).endswith(b"bytes")
        connection.sendall(START)
        assert connection.recv(65536) == b""


def test_slow_body_is_no_slow_head(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.request_head.HEAD_SECONDS", 0.4)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(START + b"content-length: 2\r\n\r\na")
        time.sleep(0.6)
        connection.sendall(b"b")
        assert connection.recv(65536).endswith(b"2 headers, 2 bytes")
