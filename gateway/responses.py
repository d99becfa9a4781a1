"""Answers on the way to the client: the decision header, errors in the protocol's own shape, and event streams."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gateway.policy import Action
from gateway.protocols import Wire
from gateway.sse import encode
from services.common.connections import ClientLeft, while_connected
from services.common.garbage import forget_frames
from services.common.logs import get_logger
from services.contracts.chat import Json
from services.contracts.errors import FedwardError


def decision_header(answer: Json) -> dict[str, str]:
    """The header that names the decision on an answer, or on the first event of a stream."""
    note = answer.get("fedward", {"decision": Action.ALLOW.value})
    return {"x-fedward-decision": note["decision"]}


def error_response(error: FedwardError, wire: Wire) -> Response:
    """An error in the protocol's own shape, with ``Retry-After`` where a retry may help."""
    status, body = wire.error(error)
    retry = {"retry-after": "1"} if status in (429, 503) else {}
    return JSONResponse(body, status_code=status, headers=retry | error.headers)


class EventStream(Response):
    """A streamed answer whose status is decided by its first event.

    An error before the first event becomes an ordinary error answer (503 and so on). After it the status has been
    sent: the error becomes the last event, and there is no closing event, so that no client takes the answer for whole.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Json, None], wire: Wire, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._more_headers = headers  # filled by the time of the first event
        self._events = events
        self._wire = wire
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes away."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientLeft:
            if not self._started:
                raise
        except FedwardError as error:
            if self._started:
                get_logger().warning("stream ended by an error", error=error.message)
                await _send_body(send, encode(self._wire.error(error)[1]), more=False)
            else:
                await error_response(error, self._wire)(scope, receive, send)
            forget_frames(error)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if not self._started:
                    await self._start(send, event)
                await _send_body(send, encode(event))
        await _send_body(send, encode(self._wire.END) if self._wire.END else b"", more=False)

    async def _start(self, send: Send, first: Json) -> None:
        self.headers.update({**self._more_headers, **decision_header(first)})
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._started = True


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
