"""The gateway's routes."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from gateway.models import find_model, list_models
from gateway.pipeline import Pipeline
from gateway.protocols import Wire, chat, completions, tgi
from gateway.readiness import Readiness
from gateway.responses import EventStream, decision_header, error_response
from gateway.settings import GatewaySettings
from gateway.upstreams import INFERENCE, SAFETY, PassedOn, Upstreams
from services.common.app import create_app, invalid_request
from services.common.connections import while_connected
from services.contracts.chat import Json
from services.contracts.errors import FedwardError


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
    app.include_router(_openai_routes(pipeline, upstreams, settings))
    app.include_router(_tgi_routes(pipeline, upstreams, settings))
    return app


def _openai_routes(pipeline: Pipeline, upstreams: Upstreams, settings: GatewaySettings) -> APIRouter:
    router = APIRouter(tags=["openai"])

    async def serve(body: Json, request: Request, wire: Wire) -> Response:
        asked = wire.read(body, settings)
        if asked.stream:
            return EventStream(pipeline.stream(asked, wire), wire)
        answer = await while_connected(request.receive, pipeline.answer(asked, wire))
        return JSONResponse(answer, headers=decision_header(answer))

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: dict[str, Any], request: Request) -> Response:
        """An answer, whole or streamed, after the prompt and every part of the answer were checked."""
        return await serve(body, request, chat)

    @router.post("/v1/completions", response_model=None)
    async def text_completions(body: dict[str, Any], request: Request) -> Response:
        """A prompt continued, whole or streamed, checked like a chat; with ``echo`` and ``logprobs``."""
        return await serve(body, request, completions)

    @router.get("/v1/models", response_model=None)
    async def models() -> Json:
        """The models that may be asked for."""
        return await list_models(upstreams, settings)

    @router.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Json:
        """One of them."""
        return await find_model(name, upstreams, settings)

    @router.post("/v1/moderations", response_model=None)
    async def moderations(request: Request) -> Response:
        """The safety service's own verdict on a text."""
        return _json(await upstreams.forward(SAFETY, "POST", "/v1/moderations", await request.body()))

    return router


def _tgi_routes(pipeline: Pipeline, upstreams: Upstreams, settings: GatewaySettings) -> APIRouter:
    router = APIRouter(tags=["tgi"], route_class=_TgiRoute)

    async def whole(body: Json, request: Request, wrap: Callable[[Json], Any]) -> Response:
        answer = await while_connected(request.receive, pipeline.answer(tgi.read(body, settings), tgi))
        return JSONResponse(wrap(answer), headers=decision_header(answer))

    def streamed(body: Json) -> Response:
        return EventStream(pipeline.stream(tgi.read(body, settings), tgi), tgi)

    @router.post("/generate", response_model=None)
    async def generate(body: dict[str, Any], request: Request) -> Response:
        """A raw prompt continued, after it and every part of the answer were checked."""
        return await whole(body, request, lambda answer: answer)

    @router.post("/generate_stream", response_model=None)
    async def generate_stream(body: dict[str, Any]) -> Response:
        """The same, one event for each token."""
        return streamed(body)

    @router.post("/", response_model=None)
    async def generate_either(body: dict[str, Any], request: Request) -> Response:
        """The route of Hugging Face's clients: ``stream`` picks; a whole answer comes in an array."""
        if body.get("stream") is True:
            return streamed(body)
        return await whole(body, request, lambda answer: [answer])

    @router.get("/info", response_model=None)
    async def info() -> Response:
        """What the inference service says of its model and limits."""
        return _json(await upstreams.forward(INFERENCE, "GET", "/info"))

    return router


class _TgiRoute(APIRoute):
    """A route whose errors have TGI's body instead of OpenAI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_tgi_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as invalid:
                return error_response(invalid_request(request, invalid), tgi)
            except FedwardError as error:
                return error_response(error, tgi)

        return handle_with_tgi_errors


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


async def _on_passed_on(request: Request, error: Exception) -> Response:
    assert isinstance(error, PassedOn)
    return error_response(error, chat)
