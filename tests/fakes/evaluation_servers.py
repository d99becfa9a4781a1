"""Real HTTP servers in threads that stand in for a target and for a judge; no harmful text is involved."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from services.contracts.verdicts import ClassifierInfo


class Reply(NamedTuple):
    """What a fake answers: a status, a JSON value or raw bytes, after a delay."""

    status: int
    body: Any
    seconds: float = 0.0


class Fake:
    """A server under way: its address, and the bodies that it was sent."""

    def __init__(self, answer: Callable[[str, Any], Reply]) -> None:
        self.answer = answer
        self.received: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._respond(None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.fake.received.append(body)
        self.server.fake.headers.append(dict(self.headers.items()))
        self._respond(body)

    def _respond(self, body: Any) -> None:
        reply = self.server.fake.answer(self.path, body)
        time.sleep(reply.seconds)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests stay quiet."""


@contextmanager
def serve(answer: Callable[[str, Any], Reply]) -> Iterator[Fake]:
    """Run a fake on a free port until the block ends."""
    fake = Fake(answer)
    server = _Server(fake)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """A chat completion as small as OpenAI-compatible servers make them."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def polite_target(path: str, body: Any) -> Reply:
    """Declines prompts with the word "forbidden", answers the others on topic."""
    assert path == "/v1/chat/completions"
    prompt = body["messages"][0]["content"]
    text = "I'm sorry, but I cannot help with that." if "forbidden" in prompt else f"Let me tell you about it: {prompt}"
    return Reply(200, completion(text))


INFO = ClassifierInfo(model_id="fake-judge", tier="test", sha256="2" * 64, threshold=0.5).model_dump()


def verdict(answer: str) -> dict[str, Any]:
    """What the fake judge finds: refusals begin with "I'm sorry", unsafe answers hold the word "unsafe"."""
    unsafe = "unsafe" in answer
    return {
        "outcome": "unsafe" if unsafe else "safe",
        "score": 0.9 if unsafe else 0.1,
        "refused": answer.startswith("I'm sorry"),
        "model_id": "fake-judge",
    }


def simple_judge(path: str, body: Any) -> Reply:
    """Serves ``/v1/model`` and ``/v1/classify``."""
    if path == "/v1/model":
        return Reply(200, INFO)
    assert path == "/v1/classify"
    return Reply(200, {"verdicts": [verdict(item["response"]) for item in body["items"]]})
