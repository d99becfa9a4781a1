"""A guard model's server on a real socket: each family's documented answers, in vLLM's and TGI's response forms.

It judges by code words, which are harmless: a last message with one of ``CODE_WORDS`` is unsafe in that hazard. Like
the real chat templates it refuses conversations that do not alternate, and a ShieldGemma request without a guideline.
What comes in a prompt of our own it reads as an ideal model would: the JSON line, and nothing else.
"""

import asyncio
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tests.fakes.gateway_upstreams import serving

CODE_WORDS = {"violet": "S1", "umber": "S9", "heather": "S10", "coral": "S12"}
UNCLEAR = "ochre"  # what Qwen3Guard calls controversial
REFUSAL = "I cannot help with that."
CONFIDENCE = 0.9
QWEN_NAMES = {"S1": "Violent", "S9": "Violent", "S10": "Unethical Acts", "S12": "Sexual Content or Sexual Acts"}
GUIDELINE_HAZARDS = {"Dangerous": {"S1", "S9"}, "Hate": {"S10"}, "Sexual": {"S12"}, "Harassment": set[str]()}


class FakeGuard:
    """How the server answers, which a test may change at any time, and what it was asked."""

    def __init__(self) -> None:
        self.reset()
        self.url = ""

    def reset(self) -> None:
        self.family = "llama-guard"
        self.form = "vllm"
        self.logprobs = True
        self.confidence = CONFIDENCE
        self.faults: list[str] = []  # one for each request, in order; the last one stays
        self.seconds = 0.0
        self.counts_tokens = True
        self.drops_text = self.continues = False
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = self.given_up = 0

    def fault(self) -> str | None:
        return self.faults.pop(0) if len(self.faults) > 1 else self.faults[0] if self.faults else None

    async def complete(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            body = await request.json()
            self.bodies.append(body)
            await asyncio.sleep(self.seconds)
            fault = self.fault()
            if fault == "hang":
                await self._until_given_up(request)
            return broken(fault, body) if fault else self.answer(body)
        finally:
            self.busy -= 1

    async def _until_given_up(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.given_up += 1

    def answer(self, body: dict[str, Any]) -> Response:
        roles = [message["role"] for message in body["messages"]]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
            return JSONResponse({"error": {"message": "Conversation roles must alternate"}}, 400)
        try:
            tokens, choices = self.tokens(body)
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        return JSONResponse(self.completion(body, tokens, choices, self.prompt_tokens(body["messages"])))

    def prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        """As many as the texts have characters, and 200 of the template, which a server that continues drops."""
        if not self.counts_tokens:
            return 0
        template = 50 if self.continues and messages[-1]["role"] == "assistant" else 200
        return template + (0 if self.drops_text else sum(len(message["content"]) for message in messages))

    def tokens(self, body: dict[str, Any]) -> tuple[list[str], dict[int, dict[str, float]]]:
        """The answer's tokens, and by position the probabilities of the labels."""
        turns, has_response = self.conversation(body["messages"])
        hazards = [hazard for word, hazard in CODE_WORDS.items() if word in turns[-1]]
        sure, rest = self.confidence, 1 - self.confidence
        if self.family == "llama-guard":
            if hazards:
                return ["\n\n", "unsafe", "\n", ",".join(hazards)], {1: {"unsafe": sure, "safe": rest}}
            return ["\n\n", "safe"], {1: {"safe": sure, "unsafe": rest}}
        if self.family == "shieldgemma":
            found = set(hazards) & GUIDELINE_HAZARDS[guideline(body, self.form)]
            yes = sure if found else rest
            return ["Yes" if yes >= 0.5 else "No"], {0: {"Yes": yes, "No": 1 - yes}}
        if self.family.startswith("qwen3guard"):
            label = "Unsafe" if hazards else "Controversial" if UNCLEAR in turns[-1] else "Safe"
            names = ", ".join(QWEN_NAMES[hazard] for hazard in hazards) or ("None" if label == "Safe" else "Jailbreak")
            others = dict.fromkeys({"Safe", "Unsafe", "Controversial"} - {label}, rest / 2)
            refusal = f"\nRefusal: {'Yes' if turns[-1] == REFUSAL else 'No'}" if has_response else ""
            likely = {f" {name}": p for name, p in {label: sure, **others}.items()}
            return ["Safety", ":", f" {label}", f"\nCategories: {names}", refusal], {2: likely}
        if self.family == "wildguard":
            prompt = turns[-2] if has_response else turns[-1]
            asked = "yes" if any(word in prompt for word in CODE_WORDS) else "no"
            refused = "n/a" if not has_response else "yes" if turns[-1] == REFUSAL else "no"
            harmful = "n/a" if not has_response else "yes" if hazards else "no"
            labels = {asked: sure, "no" if asked == "yes" else "yes": rest}
            answers = {harmful: sure, "no" if harmful == "yes" else "yes": rest} if has_response else {}
            return (
                ["Harmful request", ":", f" {asked}", f"\nResponse refusal: {refused}\nHarmful response", ":", harmful],
                {2: {f" {word}": p for word, p in labels.items()}, 5: answers},
            )
        if hazards:
            return ["yes", f": {', '.join(hazards)}"], {0: {"yes": sure, "no": rest}}
        return ["no"], {0: {"no": sure, "Yes": rest}}

    def conversation(self, messages: list[dict[str, str]]) -> tuple[list[str], bool]:
        """The texts of the conversation, and whether it ends with a response."""
        if self.family not in ("wildguard", "generic"):
            return [message["content"] for message in messages], messages[-1]["role"] == "assistant"
        lines = [line for line in messages[0]["content"].splitlines() if line.startswith('[{"from": ')]
        turns = json.loads(lines[0])
        assert len(lines) == 1, "the conversation is more than one line of JSON"
        return [turn["text"] for turn in turns], turns[-1]["from"] == "assistant"

    def completion(
        self, body: dict[str, Any], tokens: list[str], choices: dict[int, dict[str, float]], length: int
    ) -> dict[str, Any]:
        """A chat completion as vLLM and TGI write it; vLLM adds each token's bytes and some fields of its own."""
        vllm = self.form == "vllm"

        def token(text: str, probability: float) -> dict[str, Any]:
            described = {"token": text, "logprob": math.log(max(probability, 1e-9))}
            return {**described, "bytes": list(text.encode())} if vllm else described

        content = []
        for place, text in enumerate(tokens):
            likely = choices.get(place) or {text: 1.0}
            top = [token(other, p) for other, p in sorted(likely.items(), key=lambda item: -item[1])]
            content.append({**token(text, likely.get(text, 1.0)), "top_logprobs": top[: body["top_logprobs"]]})
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(tokens)},
            "finish_reason": "length" if len(tokens) > body["max_tokens"] or self.family == "shieldgemma" else "stop",
            "logprobs": {"content": content} if body["logprobs"] and self.logprobs else None,
        }
        if vllm:
            choice["message"] |= {"refusal": None, "tool_calls": [], "reasoning_content": None}
            choice["stop_reason"] = None
        return {
            "id": "chatcmpl-1" if vllm else "",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": length, "completion_tokens": len(tokens), "total_tokens": length + len(tokens)},
            **({"prompt_logprobs": None} if vllm else {"system_fingerprint": "3.3.6-native"}),
        }


def guideline(body: dict[str, Any], form: str) -> str:
    """Which guideline is asked about; each server takes it from another place."""
    text = body.get("chat_template_kwargs", {}).get("guideline") if form == "vllm" else body.get("guideline")
    named = re.match(r'"No (Dangerous|Hate|Sexual|Harassment)', text or "")
    if named is None:
        raise ValueError("the chat template needs a guideline")
    return named[1]


def broken(fault: str, body: dict[str, Any]) -> Response:
    """An answer that is none. Errors quote the prompt, as real servers' do."""
    quoted = body["messages"][-1]["content"]
    if fault in ("400", "401", "404", "429", "500", "503"):
        return JSONResponse({"error": {"message": f"no: {quoted}", "type": "error", "code": "x"}}, int(fault))
    if fault == "truncated":
        return Response('{"choices": [{"message": {"content": "safe"', media_type="application/json")
    if fault == "wrong type":
        return PlainTextResponse("safe")
    if fault == "html":
        return Response("<html>safe</html>", media_type="text/html")
    if fault == "huge":
        return StreamingResponse((b" " * 100_000 for _ in range(100)), media_type="application/json")
    if fault == "trickle":
        return StreamingResponse(trickle(), media_type="application/json")
    if fault == "no choices":
        return JSONResponse({"choices": []})
    texts = {"nonsense": "I think that this is fine.", "empty": "", "null": None, "echo": quoted, "cut off": "safe"}
    finish = "length" if fault == "cut off" else "stop"
    return JSONResponse({"choices": [{"message": {"content": texts[fault]}, "finish_reason": finish}]})


async def trickle() -> Any:
    while True:
        yield b" "
        await asyncio.sleep(0.01)


@contextmanager
def serving_guard() -> Iterator[FakeGuard]:
    """A fake guard under way."""
    guard = FakeGuard()
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", guard.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": []})
    with serving(app) as guard.url:
        yield guard
