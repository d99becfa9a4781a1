"""Server-sent events: bytes in, wherever the network cut them; the data of whole events out, and back.

Follows the WHATWG specification (HTML living standard, section 9.2.6) as far as ``data`` fields go.
"""

import json
import re

from services.contracts.chat import Json

DONE = "[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """One event is larger than the parser's limit."""


class SseParser:
    """Incremental parser; an event that is not closed by an empty line is never handed out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[str]:
        """Take the next bytes; hand out the data of the events they complete. Raises EventTooLarge."""
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):  # the second half of a CRLF that was cut in two
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        if self._size + len(self._rest) > self._limit:
            raise EventTooLarge(f"one event has more than {self._limit} bytes")
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> str | None:
        if self._at_start:
            line, self._at_start = line.removeprefix(_BOM), False
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b"\n".join(data).decode("utf-8", errors="replace") if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
            if self._size > self._limit:
                raise EventTooLarge(f"one event has more than {self._limit} bytes")
        return None


def encode(event: Json | str) -> bytes:
    """One event with this data, ready to send."""
    data = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    return f"data: {data}\n\n".encode()
