"""The gateway's routes."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.admission import Admission
from gateway.api_docs import name_bodies
from gateway.asked import wants_stream
from gateway.console.app import console_routes
from gateway.console.views import Views
from gateway.models import describe_service, find_model, list_models
from gateway.pipeline import Pipeline
from gateway.policy_file import Route
from gateway.protocols import Wire, chat, completions, tgi
from gateway.quotas import moderated_characters
from gateway.readiness import Readiness
from gateway.responses import EventStream, decision_header, error_response
from gateway.settings import GatewaySettings
from gateway.upstreams import SAFETY, PassedOn, Upstreams
from services.common.api_docs import STREAM, error_responses, whole_or_stream
from services.common.app import create_app, route_with_errors
from services.common.connections import while_connected
from services.common.garbage import forget_frames
from services.contracts.chat import ChatCompletion, Completion, GenerateAnswer, Json, TgiError


def build_app(settings: GatewaySettings) -> FastAPI:
    """The gateway as an ASGI app."""
    admission = Admission(settings)
    upstreams = Upstreams(settings)
    pipeline = Pipeline(upstreams, admission, settings)
    ready = Readiness(upstreams, admission)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with admission.running():
            await ready()  # also loads what the first call loads, which would cost the first check its deadline
            yield
            await upstreams.close()

    app = create_app("gateway", settings, lifespan=lifespan, ready=ready)
    app.add_exception_handler(PassedOn, _on_passed_on)
    if settings.console:
        app.include_router(console_routes(admission, Views(admission, upstreams, ready, settings)))
    app.include_router(_openai_routes(pipeline, admission, upstreams, settings))
    app.include_router(_tgi_routes(pipeline, admission, upstreams, settings))
    document = app.openapi
    app.openapi = lambda: name_bodies(document())  # type: ignore[method-assign]  # FastAPI's way to extend it
    return app


def _openai_routes(
    pipeline: Pipeline, admission: Admission, upstreams: Upstreams, settings: GatewaySettings
) -> APIRouter:
    router = APIRouter(tags=["openai"], responses=error_responses(400, 401, 404, 413, 429, 503))

    async def serve(body: Json, request: Request, wire: Wire, route: Route) -> Response:
        visit = await admission.visit(request.headers, request.state.request_id, route)
        if wants_stream(body):
            return EventStream(pipeline.stream(body, wire, visit), wire, visit.headers)
        answer = await while_connected(request.receive, pipeline.answer(body, wire, visit))
        return JSONResponse(answer, headers=visit.headers | decision_header(answer))

    @router.post("/v1/chat/completions", responses=whole_or_stream(ChatCompletion))
    async def chat_completions(body: dict[str, Any], request: Request) -> Response:
        """An answer, whole or streamed, after the prompt and every part of the answer were checked."""
        return await serve(body, request, chat, Route.CHAT)

    @router.post("/v1/completions", responses=whole_or_stream(Completion))
    async def text_completions(body: dict[str, Any], request: Request) -> Response:
        """A prompt continued, whole or streamed, checked like a chat; with ``echo`` and ``logprobs``."""
        return await serve(body, request, completions, Route.COMPLETIONS)

    @router.get("/v1/models", response_model=None)
    async def models(request: Request) -> Json:
        """The models that may be asked for."""
        visit = await admission.visit(request.headers, request.state.request_id, Route.CHAT)
        return await list_models(upstreams, settings, visit.policy)

    @router.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str, request: Request) -> Json:
        """One of them."""
        visit = await admission.visit(request.headers, request.state.request_id, Route.CHAT)
        return await find_model(name, upstreams, settings, visit.policy)

    @router.post("/v1/moderations")
    async def moderations(body: dict[str, Any], request: Request) -> Response:
        """The safety service's own verdict on a text; it counts as a request, with the text's tokens."""
        visit = await admission.visit(request.headers, request.state.request_id, Route.MODERATIONS)
        async with admission.recorded(visit), admission.counted(visit, moderated_characters(body)):
            verdict = await upstreams.forward(SAFETY, "POST", "/v1/moderations", await request.body())
        return Response(verdict, headers=visit.headers, media_type="application/json")

    return router


def _tgi_routes(pipeline: Pipeline, admission: Admission, upstreams: Upstreams, settings: GatewaySettings) -> APIRouter:
    in_tgis_words = route_with_errors(lambda error: error_response(error, tgi))
    errors = error_responses(401, 413, 422, 429, 503, body=TgiError)
    router = APIRouter(tags=["tgi"], route_class=in_tgis_words, responses=errors)

    async def whole(body: Json, request: Request, wrap: Callable[[Json], Any]) -> Response:
        visit = await admission.visit(request.headers, request.state.request_id, Route.GENERATE)
        answer = await while_connected(request.receive, pipeline.answer(body, tgi, visit))
        return JSONResponse(wrap(answer), headers=visit.headers | decision_header(answer))

    async def streamed(body: Json, request: Request) -> Response:
        visit = await admission.visit(request.headers, request.state.request_id, Route.GENERATE)
        return EventStream(pipeline.stream(body, tgi, visit), tgi, visit.headers)

    @router.post("/generate", response_model=GenerateAnswer)
    async def generate(body: dict[str, Any], request: Request) -> Response:
        """A raw prompt continued, after it and every part of the answer were checked."""
        return await whole(body, request, lambda answer: answer)

    @router.post("/generate_stream", response_class=Response, responses=STREAM)
    async def generate_stream(body: dict[str, Any], request: Request) -> Response:
        """The same, one event for each token."""
        return await streamed(body, request)

    @router.post("/", responses=whole_or_stream(list[GenerateAnswer]))
    async def generate_either(body: dict[str, Any], request: Request) -> Response:
        """The route of Hugging Face's clients: ``stream`` picks; a whole answer comes in an array."""
        if body.get("stream") is True:
            return await streamed(body, request)
        return await whole(body, request, lambda answer: [answer])

    @router.get("/info", response_model=None)
    async def info(request: Request) -> Json:
        """The served model and its limits."""
        await admission.visit(request.headers, request.state.request_id, Route.GENERATE)
        return await describe_service(upstreams, settings)

    return router


async def _on_passed_on(request: Request, error: Exception) -> Response:
    assert isinstance(error, PassedOn)
    forget_frames(error)
    return error_response(error, chat)
