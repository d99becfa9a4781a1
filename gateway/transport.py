"""A fast connection pool under httpx: its API, requests and errors, with aiohttp moving the bytes.

httpx's own pool looks at every connection on every call; at 16 calls in flight a call through this one costs about a
third of the CPU time. Most of the rest is ``httpx.AsyncClient``: giving an ``httpx.Request`` with a ready ``httpx.URL``
to ``handle_async_request`` without it, as ``service.py`` does, costs about a ninth.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx

# From the particular to the general: the first that fits counts.
_ERRORS: tuple[tuple[type[BaseException], type[httpx.RequestError]], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (asyncio.TimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.ServerDisconnectedError, httpx.ReadError),
    (aiohttp.ClientPayloadError, httpx.RemoteProtocolError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
    (aiohttp.ClientError, httpx.ReadError),
    (OSError, httpx.ReadError),
)
# What aiohttp would add of its own; httpx's client adds what it wants itself.
_OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


def fast_transport(keepalive_seconds: float = 2.0) -> httpx.AsyncBaseTransport:
    """A transport for ``httpx.AsyncClient``, or to be used without one; close it when the app ends.

    It keeps no cookies, follows no redirect, reads neither proxies nor passwords from the environment, and never
    repeats a POST. There is no limit on connections: whoever calls bounds the calls in flight. Of a call's timeouts
    ``connect``, ``read`` (each wait for a byte, the first too) and ``pool`` hold; ``write`` does not. Bodies of
    requests are given whole; those of answers stream as they come. Closing an answer before its end, or cancelling a
    call, closes the connection at once and without waiting, so that the service learns of it.

    TLS certificates are checked against the system's store (``SSL_CERT_FILE`` names another).

    Args:
        keepalive_seconds: how long an idle connection is kept; shorter than the server does, or it dies as it is taken.
    """
    return _AiohttpTransport(keepalive_seconds)


class _AiohttpTransport(httpx.AsyncBaseTransport):
    def __init__(self, keepalive_seconds: float) -> None:
        self._keepalive_seconds = keepalive_seconds
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the answer's body is still to be read, and to be closed."""
        patience = request.extensions.get("timeout", {})
        timeout = aiohttp.ClientTimeout(
            connect=patience.get("pool"), sock_connect=patience.get("connect"), sock_read=patience.get("read")
        )
        session = self._session or self._open()
        with _errors_of(request):
            response = await session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=request.read() or None,
                allow_redirects=False,
                timeout=timeout,
            )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response, request),
            request=request,
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": (response.reason or "").encode()},
        )

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """Made at the first call, because it belongs to the running event loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._keepalive_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OWN_HEADERS,
            auto_decompress=False,  # httpx does that, where it is wanted
        )
        return self._session


class _Body(httpx.AsyncByteStream):
    """The body of an answer, in the pieces in which it comes."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of(self._request):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        """After the last byte the connection has gone back to the pool already; before it, it is closed."""
        self._response.close()


@contextmanager
def _errors_of(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except tuple(theirs for theirs, _ in _ERRORS) as error:
        ours = next(ours for theirs, ours in _ERRORS if isinstance(error, theirs))
        raise ours(type(error).__name__, request=request) from error  # its own words may quote the answer
