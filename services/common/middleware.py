"""Pure ASGI middleware: a body limit, and request ids with metrics.

Pure ASGI because Starlette's ``BaseHTTPMiddleware`` costs about 0.3 ms a request and breaks streaming
cancellation.
"""

import time
import uuid
from contextvars import ContextVar

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.connections import CLIENT_LEFT
from services.common.metrics import REQUESTS, SECONDS
from services.contracts.errors import BodyTooLarge

# The id of the request at work, for calls of other services on its behalf.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
# Most bytes of an oversized body that are read and thrown away before the connection is closed.
_THROWN_AWAY = 64_000_000


class BodyLimit:
    """Refuse request bodies over the limit with 413, whether or not a length was announced."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, refuse it if too large, else hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > self.limit_bytes:
            await self._refuse(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit_bytes:
                await self._refuse(scope, receive, send)
                return
        await self.app(scope, _replay(body, receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the route answer 413, after the rest of the body: many clients read no answer before they have sent it.

        The app is told of it when it reads the body, so that the answer has the shape of the route's protocol.
        """
        size, more = 0, True
        while more and size < _THROWN_AWAY:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)

        async def no_body() -> Message:
            raise BodyTooLarge(f"the request body is larger than {self.limit_bytes} bytes")

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, no_body, send_last)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that hands over the body already read, and then the connection's own messages."""
    pending = True

    async def replay() -> Message:
        nonlocal pending
        if pending:
            pending = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


class Observe:
    """Give every request an id (the caller's ``x-request-id``, or a new one) and count and time it."""

    def __init__(self, app: ASGIApp, service: str) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request with its id bound to logs and answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        REQUEST_ID.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), CLIENT_LEFT  # until an answer begins, or a bug ends the request

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            # The route's template, not the path: a path may hold ids and would make one series for each.
            route = getattr(scope.get("route"), "path", "unmatched")
            REQUESTS.labels(self.service, route, str(status)).inc()
            SECONDS.labels(self.service, route).observe(time.perf_counter() - started)
            structlog.contextvars.unbind_contextvars("request_id")


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
