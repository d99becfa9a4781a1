"""The gateway's routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.chat import read_chat
from gateway.pipeline import Pipeline
from gateway.readiness import Readiness
from gateway.responses import EventStream, decision_header
from gateway.settings import GatewaySettings
from gateway.upstreams import INFERENCE, SAFETY, PassedOn, Upstreams
from services.common.app import create_app
from services.common.connections import while_connected


def build_app(settings: GatewaySettings) -> FastAPI:
    """The gateway as an ASGI app."""
    upstreams = Upstreams(settings)
    pipeline = Pipeline(upstreams, settings)
    ready = Readiness(upstreams)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await ready()  # also loads what the first call loads, which would cost the first check its deadline
        yield
        await upstreams.close()

    app = create_app("gateway", settings, lifespan=lifespan, ready=ready)
    app.add_exception_handler(PassedOn, _on_passed_on)

    @app.post("/v1/chat/completions", tags=["openai"], response_model=None)
    async def chat_completions(body: dict[str, Any], request: Request) -> Response:
        """An answer, whole or streamed, after the prompt and every part of the answer were checked."""
        chat = read_chat(body, message_limit=settings.message_limit, prompt_limit=settings.prompt_limit_characters)
        if chat.stream:
            return EventStream(pipeline.stream(chat))
        answer = await while_connected(request.receive, pipeline.answer(chat))
        return JSONResponse(answer, headers=decision_header(answer))

    @app.get("/v1/models", tags=["openai"], response_model=None)
    async def models() -> Response:
        """The models that the inference service has."""
        return _json(await upstreams.forward(INFERENCE, "GET", "/v1/models"))

    @app.post("/v1/moderations", tags=["openai"], response_model=None)
    async def moderations(request: Request) -> Response:
        """The safety service's own verdict on a text."""
        return _json(await upstreams.forward(SAFETY, "POST", "/v1/moderations", await request.body()))

    return app


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


async def _on_passed_on(request: Request, error: Exception) -> Response:
    assert isinstance(error, PassedOn)
    retry = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), status_code=error.status, headers=retry)
