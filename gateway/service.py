"""One service that the gateway calls: its address, its kept connections, its breaker; and how one call is made."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
from pydantic import AnyHttpUrl

from gateway.breaker import Breaker
from gateway.settings import GatewaySettings
from gateway.transport import fast_transport
from services.common.http import unavailable
from services.common.middleware import REQUEST_ID
from services.common.spans import Value
from services.contracts.errors import UpstreamUnavailable

BODY_LIMIT = 4_000_000
# Shorter than the 5 s after which uvicorn closes an idle connection: a kept one must not die as it is taken.
_KEEPALIVE_SECONDS = 2.0


class Service:
    """Calls without ``httpx.AsyncClient``, which costs as much as all the rest of a call. Close it when the app ends.

    ``address`` is what spans say of the service.
    """

    def __init__(self, name: str, url: AnyHttpUrl, settings: GatewaySettings) -> None:
        self.name = name
        self.breaker = Breaker(name, settings.breaker_failures, settings.breaker_seconds)
        self.address: dict[str, Value] = {"server.address": url.host or "", "server.port": url.port or 0}
        self._connect_seconds = settings.connect_seconds
        self._base = str(url).rstrip("/")
        self._urls: dict[str, httpx.URL] = {}
        self._transport = fast_transport(_KEEPALIVE_SECONDS)

    async def close(self) -> None:
        """Close all kept connections."""
        await self._transport.aclose()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        content: bytes | None,
        *,
        patience_seconds: float,
        headers: Mapping[str, str],
        again: bool = False,
    ) -> AsyncIterator[httpx.Response]:
        """An answer of any status, its body still to be read; leaving early closes the connection.

        Args:
            method: of the request.
            path: one of few, for they are kept.
            content: JSON.
            patience_seconds: longest wait for the head, and for each piece of the body.
            headers: beside those that every call has.
            again: ask once more when the connection ends before an answer has begun. A server may close a kept
                connection in the moment in which it is taken; only a call that changes nothing can be made twice.

        Raises:
            UpstreamUnavailable: no answer, or none to the end.
        """
        request = self._request(method, path, content, patience_seconds, headers)
        try:
            try:
                response = await self._transport.handle_async_request(request)
            except httpx.ReadError:
                if not again:
                    raise
                response = await self._transport.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()
        except httpx.RequestError as error:
            raise unavailable(self.name, error) from error

    async def read(self, response: httpx.Response) -> bytes:
        """The whole body; raises UpstreamUnavailable when it is larger than any proper answer."""
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            pieces.append(piece)
            size += len(piece)
            if size > BODY_LIMIT:
                raise UpstreamUnavailable(self.name, f"answered more than {BODY_LIMIT} bytes")
        return b"".join(pieces)

    def _request(
        self, method: str, path: str, content: bytes | None, patience_seconds: float, headers: Mapping[str, str]
    ) -> httpx.Request:
        if path not in self._urls:
            self._urls[path] = httpx.URL(self._base + path)
        # Nothing compressed is taken: a small body could become a huge one in memory.
        sent = {"content-type": "application/json", "accept-encoding": "identity", **headers}
        if request_id := REQUEST_ID.get():
            sent["x-request-id"] = request_id  # for its log; and a canary that has answered it answers it again
        timeout = {"connect": self._connect_seconds, "read": patience_seconds}
        # As a stream, so that httpx adds no headers: the transport knows them better, and it takes half the time.
        body = httpx.ByteStream(content or b"")
        return httpx.Request(method, self._urls[path], headers=sent, stream=body, extensions={"timeout": timeout})
