"""The gateway's protocols as its tests use them: how each asks, and how what it said is read."""

from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.fakes.gateway_stack import Stack, events


@dataclass(frozen=True)
class Speaker:
    """One route of one protocol."""

    name: str
    path: str
    stream_path: str

    def body(self, prompt: Any, *, stream: bool, **fields: Any) -> dict[str, Any]:
        flag = {"stream": stream} if self.path == self.stream_path else {}
        match self.name:
            case "chat":
                return {"model": "fake", "messages": [{"role": "user", "content": prompt}], **flag, **fields}
            case "completions":
                return {"model": "fake", "prompt": prompt, **flag, **fields}
            case _:
                return {"inputs": prompt, **flag, "parameters": {"details": True, **fields}}

    def ask(self, stack: Stack, prompt: Any = "Hello", *, stream: bool = False, **fields: Any) -> httpx.Response:
        client = stack.hasty.get(fields.pop("hasty_with", ""), stack.client)
        path = self.stream_path if stream else self.path
        return client.post(path, json=self.body(prompt, stream=stream, **fields))

    def said(self, response: httpx.Response, index: int = 0) -> str:
        """What a client puts together of a stream, without the gateway's own refusal."""
        parts = [part for part in events(response) if part != "[DONE]" and not part.get("fedward")]
        if self.name.startswith("tgi"):
            return "".join(part["token"]["text"] for part in parts if not part["token"]["special"])
        choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
        return "".join(c["text"] if self.name == "completions" else c["delta"].get("content", "") for c in choices)

    def text(self, response: httpx.Response, index: int = 0) -> str:
        """A whole answer's text."""
        body = response.json()
        match self.name:
            case "chat":
                return str(body["choices"][index]["message"]["content"])
            case "completions":
                return str(body["choices"][index]["text"])
            case _:
                return str((body[0] if isinstance(body, list) else body)["generated_text"])

    def finish_reason(self, response: httpx.Response) -> str:
        """How an answer ended, whole or streamed."""
        if response.headers["content-type"].startswith("text/event-stream"):
            ends = [part for part in events(response) if part != "[DONE]"]
            ended = [
                part["details"] if "details" in part else part["choices"][0] for part in ends if "error" not in part
            ]
            return str([end["finish_reason"] for end in ended if end and end["finish_reason"]][-1])
        body = response.json()
        answer = body[0] if isinstance(body, list) else body
        return str((answer["details"] if "details" in answer else answer["choices"][0])["finish_reason"])


CHAT = Speaker("chat", "/v1/chat/completions", "/v1/chat/completions")
COMPLETIONS = Speaker("completions", "/v1/completions", "/v1/completions")
TGI = Speaker("tgi", "/generate", "/generate_stream")
TGI_ROOT = Speaker("tgi root", "/", "/")
SPEAKERS = [CHAT, COMPLETIONS, TGI, TGI_ROOT]
by_name = pytest.mark.parametrize("speaker", SPEAKERS, ids=lambda speaker: speaker.name)
openais = pytest.mark.parametrize("speaker", [CHAT, COMPLETIONS], ids=["chat", "completions"])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
