"""A fake inference service and a fake safety service on real sockets, which fail in every way a test asks for.

The fake classifier calls a text unsafe if and only if it contains ``MARKER``, which is a harmless word.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

MARKER = "xylophonist"
BLAND = "a plain word. "


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an ASGI app by uvicorn in a thread; gives its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """A server that answers every connection with these bytes and resets it; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)


def closed_port() -> str:
    """The URL of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class Abort(Exception):
    """Makes uvicorn close the connection in the middle of the body."""


@dataclass
class Reply:
    """One HTTP answer being sent."""

    send: Send

    async def start(self, status: int = 200, kind: str = "application/json") -> None:
        headers = [(b"content-type", kind.encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, content: Any, status: int = 200) -> None:
        await self.start(status)
        await self.body(json.dumps(content).encode(), more=False)


@dataclass
class Fake:
    """What both fakes share: a fault to show, readiness, a record of the requests, and how many are at work."""

    fault: str | None = None
    ready: bool = True
    requests: list[Any] = field(default_factory=list)
    at_work: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        self.at_work += 1
        try:
            return await self._answer(scope, receive, send)
        finally:
            self.at_work -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        reply = Reply(send)
        if scope["path"] == "/health/ready":
            return await reply.json({"status": "ready" if self.ready else "not ready"}, 200 if self.ready else 503)
        working = asyncio.create_task(self.handle(scope["path"], json.loads(body) if body else None, reply))
        leaving = asyncio.create_task(_next(receive))
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        if not working.cancelled() and isinstance(error := working.exception(), Exception):
            raise error
        return None

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        raise NotImplementedError

    async def fail(self, reply: Reply, text: str) -> None:
        """Show the fault; ``text`` is in every body, so that a gateway which quotes bodies is caught."""
        match self.fault:
            case "500":
                await reply.json({"error": {"message": text, "type": "server_error", "code": "bug"}}, 500)
            case "400":
                await reply.json({"error": {"message": "no", "type": "invalid_request_error", "code": "no"}}, 400)
            case "redirect":
                await reply.json({"detail": text}, 302)
            case "hang":
                await asyncio.sleep(60)
            case "garbage":
                await reply.start()
                await reply.body(f"<html>{text}".encode(), more=False)
            case "schema":
                await reply.json({"result": text, "choices": text, "verdicts": text})
            case "reset":
                await reply.start()
                await reply.body(f'{{"verdicts": [], "text": "{text}'.encode())
                raise Abort
            case "drip":
                await reply.start()
                for _ in range(600):
                    await reply.body(b" ")
                    await asyncio.sleep(0.05)
            case _:
                raise AssertionError(f"unknown fault {self.fault}")


async def _next(receive: Receive) -> None:
    await receive()


@dataclass
class FakeSafety(Fake):
    """Flags ``MARKER``. The fault shows in checks of one direction, from the given one on, with the given text."""

    fault_direction: str = "prompt"
    fault_from: int = 0
    fault_text: str = ""
    delay: float = 0.0
    hold_prompt_while: Callable[[], bool] = lambda: False
    verdict_at: float = 0.0
    seen: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "response": 0})

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        if path == "/v1/moderations":
            return await reply.json({"id": "modr-1", "model": "fake", "results": [moderation(body["input"])]})
        self.requests.append(body)
        # A prompt check is told by its first item: the first message is never the assistant's in these tests.
        direction = "response" if "response" in body["items"][0] else "prompt"
        nth = self.seen[direction]
        self.seen[direction] += 1
        await asyncio.sleep(self.delay)
        while direction == "prompt" and self.hold_prompt_while():  # noqa: ASYNC110  (looks into another thread)
            await asyncio.sleep(0.005)
        due = direction == self.fault_direction and nth >= self.fault_from and self.fault_text in json.dumps(body)
        if self.fault and due:
            return await self._fault(reply, body)
        if direction == "prompt":
            self.verdict_at = time.monotonic()
        return await reply.json({"verdicts": [verdict(item) for item in body["items"]]})

    async def _fault(self, reply: Reply, body: Any) -> None:
        good = [verdict(item) for item in body["items"]]
        if self.fault == "unscored":
            await reply.json({"verdicts": [v | {"outcome": "unscored", "score": None} for v in good]})
        elif self.fault == "too few":
            await reply.json({"verdicts": good[1:]})
        else:
            await self.fail(reply, json.dumps(body)[1:-1].replace('"', "'"))


def verdict(item: Any) -> dict[str, Any]:
    unsafe = MARKER in json.dumps(item)
    return {
        "outcome": "unsafe" if unsafe else "safe",
        "score": 0.9 if unsafe else 0.1,
        "threshold": 0.5,
        "categories": {"S1": 0.9 if unsafe else 0.0},
        "model_id": "fake",
        "reason": json.dumps(item),
    }


def moderation(text: str) -> dict[str, Any]:
    unsafe = MARKER in text
    return {"flagged": unsafe, "categories": {"violence": unsafe}, "category_scores": {"violence": float(unsafe)}}


@dataclass
class FakeInference(Fake):
    """Answers with ``pieces``, one chunk each; the fault shows before piece ``fault_at``, or at once when that is 0."""

    pieces: list[str] = field(default_factory=lambda: [BLAND])
    pause: Callable[[int], float] = lambda _: 0.0
    fault_at: int = 0
    usage: bool = False
    name: str = "fake"
    started_at: float = 0.0
    finished: int = 0
    cancelled: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        if path == "/v1/models":
            await reply.json({"object": "list", "data": [{"id": "fake", "object": "model", "created": 1}]})
            return
        self.requests.append(body)
        self.started_at = time.monotonic()
        try:
            if body["model"] != "fake":
                error = {
                    "message": f"no model {body['model']}",
                    "type": "invalid_request_error",
                    "code": "model_not_found",
                }
                await reply.json({"error": error | {"param": "model"}}, 404)
            elif self.fault and self.fault_at == 0:
                await self.fail(reply, self.text)
            elif body["stream"]:
                await self._stream(reply)
            else:
                await self._whole(reply)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1

    async def _whole(self, reply: Reply) -> None:
        for i in range(len(self.pieces)):
            await asyncio.sleep(self.pause(i))
        message = {"role": "assistant", "content": self.text, "reasoning_content": f"thinking of {MARKER}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        choices = [choice, choice | {"index": 1}] if self.fault == "two choices" else [choice]
        await reply.json(self._head("chat.completion") | {"choices": choices, "usage": USAGE})

    async def _stream(self, reply: Reply) -> None:
        await reply.start(kind="text/event-stream")
        await self._event(reply, {"role": "assistant", "content": ""})
        for i, piece in enumerate(self.pieces):
            await asyncio.sleep(self.pause(i))
            if self.fault and i == self.fault_at:
                return await self._break(reply, piece)
            await self._event(reply, {"content": piece, "reasoning_content": f"thinking of {MARKER}"})
        if self.fault == "no finish":
            return await reply.body(b"data: [DONE]\n\n", more=False)
        await self._event(reply, {}, finish_reason="stop")
        if self.usage:
            await reply.body(sse(self._head("chat.completion.chunk") | {"choices": [], "usage": USAGE}))
        return await reply.body(b"data: [DONE]\n\n", more=False)

    async def _break(self, reply: Reply, piece: str) -> None:
        match self.fault:
            case "reset":
                await reply.body(b'data: {"id": "1", "choices": [{"delta": {"content": "' + piece.encode())
                raise Abort
            case "hang":
                await asyncio.sleep(60)
            case "garbage":
                await reply.body(f"data: <html>{piece}\n\n".encode(), more=False)
            case "end":
                await reply.body(f"data: {piece}".encode(), more=False)
            case "error event":
                error = {"message": piece, "http_status_code": 422}
                await reply.body(sse({"error": error}), more=False)
            case "two choices":
                await self._event(reply, {"content": piece}, index=1)
                await asyncio.sleep(60)
            case "drip":
                while True:
                    await reply.body(b": keep-alive\n\n")
                    await asyncio.sleep(0.05)
            case _:
                raise AssertionError(f"unknown fault {self.fault}")

    async def _event(
        self, reply: Reply, delta: dict[str, str], finish_reason: str | None = None, index: int = 0
    ) -> None:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        await reply.body(sse(self._head("chat.completion.chunk") | {"choices": [choice]}))

    def _head(self, kind: str) -> dict[str, Any]:
        names = {"id": "chatcmpl-1", "model": self.name, "system_fingerprint": "adapter-1"}
        return {"object": kind, "created": 1, **names}


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def sse(event: Any) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
