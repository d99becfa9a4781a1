"""A bound on what comes before a request's body: its size, its number of headers, and the time it takes to arrive.

uvicorn on httptools has none of the three (measured on 0.49: 50 MB of headers are read, kept and handed to the app, and
a head that never ends holds its connection for ever); h11's 64 KB limit applies to uvicorn's other protocol only. A
middleware would come too late, since it sees headers that are already in memory.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.contracts.errors import HeadTooLarge

HEAD_LIMIT = 65_536  # bytes of URL and headers; nginx allows 32 KB, and a token may have 16 KB
HEADER_COUNT = 100
HEAD_SECONDS = 10.0


class BoundedHead(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol; answers 431 to a head over the limits (RFC 6585), and closes on a slow one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._received = True, 0
        self._refusal: HeadTooLarge | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Give the first head its time."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse a head that has grown over the limit before its end was seen; else let it be parsed."""
        if self._in_head and self._received > HEAD_LIMIT:
            self._refusal = HeadTooLarge(f"the request's headers are larger than {HEAD_LIMIT} bytes")
            self.send_400_response("")
            return
        self._received += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Start to measure the next request of the connection."""
        super().on_message_begin()
        if not self._in_head:
            self._in_head, self._received = True, 0
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        """Check the head as parsed; an error here ends the parsing, and uvicorn answers by ``send_400_response``."""
        self._head_is_over()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > HEAD_LIMIT:
            self._refusal = HeadTooLarge(f"the request's headers are larger than {HEAD_LIMIT} bytes")
        elif len(self.headers) > HEADER_COUNT:
            self._refusal = HeadTooLarge(f"the request has more than {HEADER_COUNT} headers")
        if self._refusal is not None:
            raise self._refusal
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with the head; with anything else that cannot be parsed, as uvicorn does."""
        if self._refusal is None:
            super().send_400_response(msg)
            return
        body = json.dumps(self._refusal.body()).encode()
        head = (
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()

    def _head_is_over(self) -> None:
        self._in_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
