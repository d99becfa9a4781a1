"""Calls between processes: what each failure becomes, and that no error quotes a body that may hold a prompt."""

import inspect
import json

import httpx
import pytest
from pydantic import BaseModel

from services.common.http import ServiceClient, read_answer, unavailable
from services.contracts.errors import RequestError, UpstreamError, UpstreamRejected, UpstreamUnavailable
from tests.fakes.gateway_upstreams import closed_port, raw_server

SECRET = "xylophonist"


class Answer(BaseModel):
    """What is expected."""

    value: int


def response(status: int, body: str) -> httpx.Response:
    return httpx.Response(status, content=body.encode())


def own_error(message: str) -> str:
    return json.dumps(RequestError(message).body())


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (response(400, own_error("items: too many")), UpstreamRejected, "s: HTTP 400: items: too many"),
        (response(429, own_error("full")), UpstreamUnavailable, "s: HTTP 429: full"),
        (response(503, SECRET), UpstreamUnavailable, "s: HTTP 503: Service Unavailable"),
        (response(422, f'{{"detail": "{SECRET}"}}'), UpstreamRejected, "s: HTTP 422: Unprocessable Entity"),
        (response(302, SECRET), UpstreamRejected, "s: HTTP 302: Found"),
        (
            response(200, f'{{"value": "{SECRET}"}}'),
            UpstreamUnavailable,
            "s: answered something unreadable: value: Input should be a valid integer, unable to parse string as an "
            "integer",
        ),
        (response(200, SECRET), UpstreamUnavailable, "s: answered something unreadable: body: Invalid JSON: "),
    ],
)
def test_failure_is_told_without_the_body(answer: httpx.Response, error: type[UpstreamError], message: str) -> None:
    with pytest.raises(error) as failure:
        read_answer("s", answer, Answer)
    assert type(failure.value) is error
    assert failure.value.message.startswith(message)
    assert SECRET not in failure.value.message


def test_message_of_a_foreign_server_is_not_quoted_at_all() -> None:
    with pytest.raises(UpstreamRejected, match=r"^s: HTTP 400: Bad Request$"):
        read_answer("s", response(400, own_error(SECRET)), Answer, quote=False)


REQUEST_ERRORS = [
    kind for _, kind in inspect.getmembers(httpx, inspect.isclass) if issubclass(kind, httpx.RequestError)
]


@pytest.mark.parametrize("kind", REQUEST_ERRORS)
def test_every_error_of_httpx_has_words_of_ours(kind: type[httpx.RequestError]) -> None:
    error = unavailable("s", kind(f"Illegal header value b'{SECRET}'"))
    assert error.message in (
        "s: no answer within the deadline", "s: cannot be reached", "s: the connection broke"
    )  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [b"", f"{SECRET}\r\n\r\n".encode(), b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nword"],
    ids=["nothing", "not HTTP", "not gzip"],
)
def test_client_names_the_service_that_speaks_no_http(answer: bytes) -> None:
    with (
        raw_server(answer) as url,
        ServiceClient("s", url, attempts=1) as client,
        pytest.raises(UpstreamUnavailable, match=r"^s: the connection broke$"),
    ):
        client.get("/", Answer)


def test_client_names_the_service_that_is_down() -> None:
    with (
        ServiceClient("s", closed_port(), attempts=1) as client,
        pytest.raises(UpstreamUnavailable, match=r"^s: cannot be reached$"),
    ):
        client.get("/", Answer)
