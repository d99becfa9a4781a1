"""A plain FastAPI and httpx gateway: the prompt is checked, then the model asked, then its answer checked.

A stream goes out as it comes and is checked at its end, since that is what a few lines can do. It is here to be
compared with, not to be used.
"""

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

UPSTREAM_URL = os.environ["UPSTREAM_URL"]
CLASSIFIER_URL = os.environ["CLASSIFIER_URL"]
BLOCKED: dict[str, Any] = {"error": {"message": "blocked", "type": "content_filter", "code": "content_filter"}}

app = FastAPI()
client = httpx.AsyncClient(timeout=60.0)


async def is_safe(prompt: str, response: str | None = None) -> bool:
    """Whether the classifier calls the prompt, or the response to it, safe."""
    item = {"prompt": prompt} if response is None else {"prompt": prompt, "response": response}
    answer = await client.post(f"{CLASSIFIER_URL}/v1/classify", json={"items": [item]})
    answer.raise_for_status()
    return bool(answer.json()["verdicts"][0]["outcome"] == "safe")


@app.get("/health")
async def health() -> dict[str, str]:
    """It is alive."""
    return {"status": "ok"}


@app.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """A guarded chat completion, whole or streamed."""
    body = await request.json()
    prompt = "\n".join(message["content"] for message in body["messages"])
    if not await is_safe(prompt):
        return JSONResponse(BLOCKED, status_code=400)
    if body.get("stream"):
        return StreamingResponse(stream(body, prompt), media_type="text/event-stream")
    answer = await client.post(f"{UPSTREAM_URL}/v1/chat/completions", json=body)
    answer.raise_for_status()
    completion = answer.json()
    if not await is_safe(prompt, completion["choices"][0]["message"]["content"]):
        return JSONResponse(BLOCKED, status_code=400)
    return JSONResponse(completion)


async def stream(body: dict[str, Any], prompt: str) -> AsyncIterator[str]:
    """The events of an answer as they come, and a check of the whole before the end mark."""
    text = ""
    async with client.stream("POST", f"{UPSTREAM_URL}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                break
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                yield f"{line}\n\n"
    if not await is_safe(prompt, text):
        yield f"data: {json.dumps(BLOCKED)}\n\n"
    yield "data: [DONE]\n\n"
