"""Fake safety and critique services on real sockets, which fail in every way a test asks for.

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
from itertools import chain, repeat
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
def raw_server(*answers: bytes, received: list[bytes] | None = None) -> Iterator[str]:
    """A server that answers each connection with the next of these bytes, or the last, and closes it; gives its URL.

    What it is sent is added to ``received``.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    coming = chain(answers, repeat(answers[-1]))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                sent = connection.recv(65536)
                if received is not None:
                    received.append(sent)
                connection.sendall(next(coming))

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
    adapter: str = ""

    async def start(self, status: int = 200, kind: str = "application/json") -> None:
        headers = [(b"content-type", kind.encode())]
        if self.adapter:
            headers.append((b"x-fedward-adapter-sha256", self.adapter.encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, content: Any, status: int = 200) -> None:
        await self.start(status)
        await self.body(json.dumps(content).encode(), more=False)


@dataclass
class Fake:
    """What both fakes share: a fault to show, readiness, a record of the requests, and how many are at work.

    ``adapter`` is what the header of every answer names; ``headers`` are those of the last request.
    """

    fault: str | None = None
    ready: bool = True
    adapter: str = ""
    requests: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
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
        reply = Reply(send, self.adapter)
        if scope["path"] == "/health/ready":
            return await reply.json({"status": "ready" if self.ready else "not ready"}, 200 if self.ready else 503)
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
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
    """Flags ``MARKER``. The fault shows in checks of one direction, from the given one on, with the given text.

    ``alter`` changes each verdict.
    """

    fault_direction: str = "prompt"
    fault_from: int = 0
    fault_text: str = ""
    delay: float = 0.0
    hold_prompt_while: Callable[[], bool] = lambda: False
    verdict_at: float = 0.0
    alter: Callable[[Any], Any] = lambda verdict: verdict
    seen: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "response": 0})

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        if path == "/v1/model":
            return await reply.json({"model_id": "fake", "tier": "ngram", "sha256": "c" * 64, "threshold": 0.5})
        if path == "/v1/moderations":
            found = moderation(json.dumps(body.get("input")))
            return await reply.json({"id": "modr-1", "model": "fake", "results": [found]})
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
        return await reply.json({"verdicts": [self.alter(verdict(item)) for item in body["items"]]})

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
class FakeCritique(Fake):
    """Answers every draft with the same revision, within ``delay`` seconds."""

    revision: str = "Here is a better answer."
    revised: bool = True
    rejected_because: str | None = None
    delay: float = 0.0

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        assert path == "/v1/revise"
        self.requests.append(body)
        await asyncio.sleep(self.delay)
        if self.fault == "too few":
            return await reply.json({"revisions": []})
        if self.fault:
            return await self.fail(reply, json.dumps(body)[1:-1].replace('"', "'"))
        names = {"principle_id": "no-harm", "constitution_sha256": "c" * 64, "model_id": "fake"}
        critique = {"critique": "Problem: it is about music.", "problem": True, **names}
        revision = {"revision": self.revision, "revised": self.revised, "rejected_because": self.rejected_because}
        return await reply.json({"revisions": [revision | {"critique": critique}]})
