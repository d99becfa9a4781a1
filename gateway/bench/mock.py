"""``python -m gateway.bench.mock``: a mock model and a mock classifier, in one process, on two ports of 127.0.0.1.

A bare asyncio protocol on uvloop and httptools: a request costs it tens of microseconds, so that what is measured is
the gateway in front of it. The first line of its output is a JSON object with both ports; it ends with its standard
input, so that no crash of whoever started it leaves it behind.
"""

import asyncio
import json
import sys
from typing import Any, cast

import httptools
import uvloop

from gateway.bench import mock_answers
from gateway.bench.script import MID_STREAM_WORDS, Counters, Fault, Script

Head = bytes
HANG_SECONDS = 600.0
DRIP_SECONDS = 0.1
_JSON: Head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
_ERROR: Head = b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\n"
_STREAM: Head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Services:
    """Both listeners, and the script that they follow."""

    def __init__(self) -> None:
        self.set_script(Script())
        self.connections: dict[str, set[Connection]] = {"upstream": set(), "classifier": set()}
        self.ports: dict[str, int] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._control: asyncio.Server | None = None

    def set_script(self, script: Script) -> None:
        """Follow another script; counters start at zero."""
        self.script, self.counters = script, Counters()
        self.whole_answer = mock_answers.whole(script)

    async def listen(self) -> None:
        """Open all ports: of the model, of the classifier, and the one where scripts are set."""
        loop = asyncio.get_running_loop()
        self._control = await loop.create_server(lambda: Connection(self, "control"), "127.0.0.1", 0)
        self.ports["control"] = self._control.sockets[0].getsockname()[1]
        for name in self.connections:
            await self._open(name)

    async def apply(self, script: Script) -> None:
        """Follow a script, and close or open the ports of services that it has down or up."""
        self.set_script(script)
        for name, fault in (("upstream", script.upstream_fault), ("classifier", script.classifier_fault)):
            if fault == "down" and script.fault_after == 0:
                self.take_down(name)
            elif name not in self._servers:
                await self._open(name)

    def take_down(self, name: str) -> None:
        """Refuse connections, and break those there are."""
        if server := self._servers.pop(name, None):
            server.close()
        for connection in tuple(self.connections[name]):
            connection.transport.abort()

    async def _open(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self, name), "127.0.0.1", self.ports.get(name, 0))
        self._servers[name] = server
        self.ports[name] = server.sockets[0].getsockname()[1]


class Connection(asyncio.Protocol):
    """One connection of HTTP/1.1; requests come one after the other, never pipelined."""

    transport: asyncio.Transport

    def __init__(self, services: Services, name: str) -> None:
        self._services, self._name = services, name
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""
        self._work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._services.connections.get(self._name, set()).add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what was being answered."""
        self._services.connections.get(self._name, set()).discard(self)
        if self._work:
            self._work.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse; the parser calls the three methods below."""
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """The path."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer."""
        url, body, self._url, self._body = self._url, self._body, b"", b""
        if self._name == "control":
            self._work = asyncio.ensure_future(self._follow(body))
        elif self._parser.get_method() == b"GET":
            self.answer(_JSON, mock_answers.get(url))
        elif self._name == "classifier":
            self._check(url, body)
        else:
            self._work = asyncio.ensure_future(self._generate(json.loads(body)))

    def answer(self, head: Head, body: bytes) -> None:
        """Send a whole answer."""
        if not self.transport.is_closing():
            self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))

    def chunk(self, data: bytes) -> None:
        """Send a part of a streamed answer."""
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def _follow(self, body: bytes) -> None:
        if body:
            await self._services.apply(Script.model_validate_json(body))
        self.answer(_JSON, self._services.counters.model_dump_json().encode())

    def _check(self, url: bytes, body: bytes) -> None:
        script, counters = self._services.script, self._services.counters
        counters.checks += 1
        counters.check_bytes += len(body)
        if script.classifier_fault and counters.checks > script.fault_after:
            self._work = asyncio.ensure_future(self._fail(script.classifier_fault))
        else:
            verdict = mock_answers.verdict(url, body)
            asyncio.get_running_loop().call_later(script.check_seconds, self.answer, _JSON, verdict)

    async def _generate(self, request: dict[str, Any]) -> None:
        script, counters = self._services.script, self._services.counters
        counters.generations += 1
        counters.generations_open += 1
        try:
            if request.get("stream"):
                await self._stream(script)
            elif script.upstream_fault:
                await self._fail(script.upstream_fault)
            else:
                await asyncio.sleep(script.word_seconds * script.words)
                self.answer(_JSON, self._services.whole_answer)
        finally:
            counters.generations_open -= 1

    async def _stream(self, script: Script) -> None:
        if script.upstream_fault == "500":
            return await self._fail("500")
        self.transport.write(_STREAM)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for i, event in enumerate(mock_answers.events(script)):
            if script.upstream_fault and i > MID_STREAM_WORDS:
                return await self._fail_mid_stream(script.upstream_fault)
            if script.word_seconds:  # by the clock: a word that is late must not make all that follow late
                await asyncio.sleep(began + (i + 1) * script.word_seconds - loop.time())
            self.chunk(event)
        self.transport.write(b"0\r\n\r\n")
        return None

    async def _fail(self, fault: Fault) -> None:
        match fault:
            case "500":
                self.answer(_ERROR, b'{"error": {"message": "mock fault", "type": "server_error"}}')
            case "garbage":
                self.answer(_JSON, b'{"verdict": tr' + b"<html>\xff" * 3)
            case "hang":
                await asyncio.sleep(HANG_SECONDS)
            case "down":
                self._services.take_down(self._name)
            case "reset":
                self.transport.write(_JSON + b'content-length: 900\r\n\r\n{"')
                self.transport.abort()
            case "drip":
                self.transport.write(_JSON + b"content-length: 100000\r\n\r\n")
                while True:
                    self.transport.write(b" ")
                    await asyncio.sleep(DRIP_SECONDS)

    async def _fail_mid_stream(self, fault: Fault) -> None:
        match fault:
            case "garbage":
                self.chunk(b"data: {<html>\xff\n\n")
                self.transport.write(b"0\r\n\r\n")
            case "drip":
                while True:
                    self.chunk(b": keep-alive\n\n")
                    await asyncio.sleep(DRIP_SECONDS)
            case "hang":
                await asyncio.sleep(HANG_SECONDS)
            case _:
                self.transport.abort()


async def main() -> None:
    """Serve until the standard input ends."""
    services = Services()
    await services.listen()
    print(json.dumps(services.ports), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    uvloop.run(main())
