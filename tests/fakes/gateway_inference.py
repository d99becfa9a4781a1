"""A fake inference service that speaks all three protocols, and fails in every way a test asks for."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

from tests.fakes.gateway_upstreams import BLAND, MARKER, Abort, Fake, Reply


class Step(NamedTuple):
    """One piece of what the fake model says; ``other`` is the token that it nearly chose instead."""

    choice: int
    channel: str
    text: str
    other: str = ""


@dataclass
class FakeInference(Fake):
    """Says ``pieces``, one event each, in any of the three protocols.

    ``others`` are the pieces of further choices, ``reasoning`` comes before the content and ``calls`` after it, each a
    name and the pieces of its arguments; with ``alternatives``, one for each piece, tokens are told about. The fault
    shows before piece ``fault_at``, or at once when that is 0. ``alter`` changes a whole answer, or each event. Fields
    that have no check of their own hold ``MARKER``.
    """

    pieces: list[str] = field(default_factory=lambda: [BLAND])
    others: list[list[str]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    legacy_call: tuple[str, str] | None = None
    alternatives: list[str] = field(default_factory=list)
    pause: Callable[[int], float] = lambda _: 0.0
    fault_at: int = 0
    usage: bool = False
    fingerprint: str = "ad" * 32
    alter: Callable[[Any], Any] = lambda said: said
    started_at: float = 0.0
    finished: int = 0
    cancelled: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def steps(self) -> list[Step]:
        """Everything that is said: reasoning, then the choices' pieces in turn."""
        said = [Step(0, "reasoning_content", text) for text in self.reasoning]
        alternatives = self.alternatives or [""] * len(self.pieces)
        told = [Step(0, "content", *pair) for pair in zip(self.pieces, alternatives, strict=True)]
        others = [[Step(i, "content", text) for text in pieces] for i, pieces in enumerate(self.others, start=1)]
        for row in zip_longest(told, *others):
            said += [step for step in row if step]
        return said

    async def handle(self, path: str, body: Any, reply: Reply) -> None:
        if path == "/v1/models":
            card = {"object": MARKER, "created": 1, "owned_by": MARKER, "root": MARKER, "sha256": self.fingerprint}
            cards = [card | {"id": name, "max_model_len": 512} for name in ("fake", "secret", "other")]
            return await reply.json({"object": MARKER, "data": cards})
        if path == "/info":
            return await reply.json(INFO)
        if path == "/v1/release":
            return await reply.json({"served_model": "fake", "adapter": "round-2", "sha256": "a" * 64})
        self.requests.append(body)
        self.started_at = time.monotonic()
        shape: Shape = {"/v1/chat/completions": ChatShape, "/v1/completions": TextShape}.get(path, TgiShape)(self)
        try:
            if (model := body.get("model") or body.get("parameters", {}).get("adapter_id", "fake")) != "fake":
                await reply.json(shape.error(f"no model {model}", "model_not_found"), 404)
            elif self.fault and self.fault_at == 0 and self.fault != "two choices":  # that one is an answer
                await self.fail(reply, self.text)
            elif path == "/generate_stream" or body.get("stream"):
                await self._stream(shape, reply)
            else:
                await self._whole(shape, reply)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1
        return None

    async def _whole(self, shape: "Shape", reply: Reply) -> None:
        for i in range(len(self.pieces)):
            await asyncio.sleep(self.pause(i))
        await reply.json(self.alter(shape.whole()))

    async def _stream(self, shape: "Shape", reply: Reply) -> None:
        await reply.start(kind="text/event-stream")
        await self._send(reply, shape.begin())
        for i, step in enumerate(self.steps()):
            await asyncio.sleep(self.pause(i))
            if self.fault and i == self.fault_at:
                return await self._break(shape, reply, step)
            await self._send(reply, [shape.piece(step)])
        await asyncio.sleep(self.pause(len(self.steps())))
        await self._send(reply, shape.end())
        return await reply.body(b"" if isinstance(shape, TgiShape) else b"data: [DONE]\n\n", more=False)

    async def _break(self, shape: "Shape", reply: Reply, step: Step) -> None:
        match self.fault:
            case "reset":
                await reply.body(b'data: {"id": "1", "choices": [{"delta": {"content": "' + step.text.encode())
                raise Abort
            case "hang":
                await asyncio.sleep(60)
            case "garbage":
                await reply.body(f"data: <html>{step.text}\n\n".encode(), more=False)
            case "schema":
                await reply.body(sse({"choices": step.text, "token": step.text}), more=False)
            case "no finish":
                await reply.body(b"data: [DONE]\n\n", more=False)
            case "end":
                await reply.body(f"data: {step.text}".encode(), more=False)
            case "error event":
                await reply.body(sse(shape.error(step.text, "failed")), more=False)
            case "two choices":
                await self._send(reply, [shape.piece(step._replace(choice=1))])
                await asyncio.sleep(60)
            case "drip":
                while True:
                    await reply.body(b": keep-alive\n\n")
                    await asyncio.sleep(0.05)
            case _:
                raise AssertionError(f"unknown fault {self.fault}")

    async def _send(self, reply: Reply, events: list[dict[str, Any]]) -> None:
        for event in events:
            await reply.body(sse(self.alter(event)))


class ChatShape:
    """Chat completions as OpenAI and vLLM answer them."""

    kind = "chat.completion"

    def __init__(self, fake: FakeInference) -> None:
        self.fake = fake
        self.choices = range(2 if fake.fault == "two choices" else 1 + len(fake.others))

    def error(self, message: str, code: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": "model"}}

    def begin(self) -> list[dict[str, Any]]:
        deltas = [{"role": "assistant", "content": ""} for _ in range(1 + len(self.fake.others))]
        return [self.event([self.choice(i, delta=delta)]) for i, delta in enumerate(deltas)]

    def piece(self, step: Step) -> dict[str, Any]:
        return self.event([self.choice(step.choice, [step], delta={step.channel: step.text, "unknown": MARKER})])

    def end(self) -> list[dict[str, Any]]:
        events = []
        for index, (name, arguments) in enumerate(self.fake.calls):
            for i, piece in enumerate(arguments):
                begin = {"id": f"call_{index}", "type": "function"} if i == 0 else {}
                function = {"arguments": piece} | ({"name": name} if i == 0 else {})
                call: dict[str, Any] = {"index": index, "function": function, **begin}
                events.append(self.event([self.choice(0, delta={"tool_calls": [call]})]))
        if self.fake.legacy_call:
            events.append(self.event([self.choice(0, delta={"function_call": self.legacy()})]))
        for i in range(1 + len(self.fake.others)):
            events.append(self.event([self.choice(i, delta={}) | {"finish_reason": self.reason(i)}]))
        return [*events, self.event([]) | {"usage": USAGE}] if self.fake.usage else events

    def whole(self) -> dict[str, Any]:
        choices = []
        for i in self.choices:
            steps = [step for step in self.fake.steps() if step.choice == i and step.channel == "content"]
            text = "".join(step.text for step in steps)
            message: dict[str, Any] = {"role": "assistant", "content": text, "unknown": MARKER}
            if i == 0:
                message |= {"reasoning_content": "".join(self.fake.reasoning), "tool_calls": self.tool_calls()}
                message |= {"function_call": self.legacy()} if self.fake.legacy_call else {}
            choices.append(self.choice(i, steps, message=message) | {"finish_reason": self.reason(i)})
        return self.event(choices) | {"usage": USAGE}

    def tool_calls(self) -> list[dict[str, Any]]:
        return [
            {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
            for i, (name, arguments) in enumerate(self.fake.calls)
        ]

    def legacy(self) -> dict[str, str]:
        assert self.fake.legacy_call
        return dict(zip(("name", "arguments"), self.fake.legacy_call, strict=True))

    def reason(self, index: int) -> str:
        return "tool_calls" if self.fake.calls and index == 0 else "stop"

    def choice(self, index: int, steps: Sequence[Step] = (), **said: Any) -> dict[str, Any]:
        told = [step for step in steps if step.other]
        return {"index": index, **said, "finish_reason": None, "logprobs": self.logprobs(told) if told else None}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        tokens = []
        for step in steps:
            tops = [{"token": text, "logprob": -1.5, "bytes": list(text.encode())} for text in (step.text, step.other)]
            tokens.append(tops[0] | {"top_logprobs": tops, "unknown": MARKER})
        return {"content": tokens}

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        names = {"id": MARKER, "model": MARKER, "system_fingerprint": self.fake.fingerprint}
        return {"object": self.kind, "created": 1, **names, "choices": choices, "unknown": MARKER}


class TextShape(ChatShape):
    """Text completions."""

    kind = "text_completion"

    def begin(self) -> list[dict[str, Any]]:
        return []

    def piece(self, step: Step) -> dict[str, Any]:
        return self.event([self.choice(step.choice, [step], text=step.text)])

    def end(self) -> list[dict[str, Any]]:
        ends = [self.choice(i, text="") | {"finish_reason": "stop"} for i in range(1 + len(self.fake.others))]
        events = [self.event([end]) for end in ends]
        return [*events, self.event([]) | {"usage": USAGE}] if self.fake.usage else events

    def whole(self) -> dict[str, Any]:
        choices = []
        for i in self.choices:
            steps = [step for step in self.fake.steps() if step.choice == i]
            text = "".join(step.text for step in steps)
            choices.append(self.choice(i, steps, text=text) | {"finish_reason": "stop", "unknown": MARKER})
        return self.event(choices) | {"usage": USAGE}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any]:
        return {
            "tokens": [step.text for step in steps],
            "token_logprobs": [-1.5 for _ in steps],
            "top_logprobs": [{step.text: -1.5, step.other: -1.5} for step in steps],
            "text_offset": list(range(len(steps))),
        }


class TgiShape(ChatShape):
    """text-generation-inference: the last event of a stream is a special token's."""

    def error(self, message: str, code: str) -> dict[str, Any]:
        return {"error": message, "error_type": "validation"}

    def begin(self) -> list[dict[str, Any]]:
        return []

    def piece(self, step: Step) -> dict[str, Any]:
        top = {"top_tokens": [self.token(step.text), self.token(step.other)]} if step.other else {}
        return {"index": 1, "token": self.token(step.text), "generated_text": None, "details": None} | top

    def end(self) -> list[dict[str, Any]]:
        last = {"index": 9, "token": self.token("</s>") | {"special": True}, "generated_text": self.fake.text}
        return [last | {"details": self.facts() | {"input_length": 3, "unknown": MARKER}}]

    def whole(self) -> dict[str, Any]:
        steps = self.fake.steps()
        details = self.facts() | {"prefill": [], "tokens": [self.token(step.text) for step in steps]}
        if self.fake.alternatives:
            details["top_tokens"] = [[self.token(step.text), self.token(step.other)] for step in steps]
        return {"generated_text": self.fake.text, "details": details, "unknown": MARKER}

    def facts(self) -> dict[str, Any]:
        return {"finish_reason": "eos_token", "generated_tokens": len(self.fake.pieces), "seed": None}

    def token(self, text: str) -> dict[str, Any]:
        return {"id": 7, "text": text, "logprob": -1.5, "special": False}


Shape = ChatShape


INFO = {
    "model_id": MARKER,
    "model_sha": "ad" * 20,
    "model_dtype": MARKER,
    "max_input_tokens": 511,
    "max_total_tokens": 512,
    "router": MARKER,
    "version": MARKER,
    "unknown": 1,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def sse(event: Any) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()
