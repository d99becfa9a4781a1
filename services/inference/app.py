"""The inference service's routes: parse, call the service, map the result."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from services.common.api_docs import STREAM, error_responses, whole_or_stream
from services.common.app import create_app, route_with_errors
from services.common.connections import while_connected
from services.contracts.adapters import (
    ActivateRequest,
    AdapterInfo,
    CanaryRequest,
    LoadAdapterRequest,
    Release,
    UnloadAdapterRequest,
)
from services.contracts.chat import ChatCompletion, Completion, GenerateAnswer, GenerateRequest, Json, TgiError
from services.contracts.errors import FedwardError
from services.inference import openai_chat, openai_completions, tgi
from services.inference.answers import Pieces, all_answers
from services.inference.openai_requests import ChatBody, CompletionBody
from services.inference.service import InferenceService


def build_app(service: InferenceService) -> FastAPI:
    """The service as an ASGI app; its engine runs from the app's start to its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    async def ready() -> str | None:
        return None if service.engine.alive else "the generation thread has ended"

    app = create_app("inference", service.settings, lifespan=lifespan, ready=ready)
    app.include_router(_openai_routes(service))
    app.include_router(_tgi_routes(service))
    app.include_router(_adapter_routes(service))
    return app


def _openai_routes(service: InferenceService) -> APIRouter:
    router = APIRouter(tags=["openai"], responses=error_responses(400, 404, 413, 429))
    started = int(time.time())

    @router.post("/v1/chat/completions", responses=whole_or_stream(ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation; with ``stream`` as server-sent events."""
        pieces = await service.chat(body, _key(request))
        if body.stream:
            return _stream(pieces, openai_chat.events(pieces, body, service.base.vocabulary))
        answer = await while_connected(request.receive, pieces.answer())
        content = openai_chat.completion(pieces, answer, body, service.base.vocabulary)
        return JSONResponse(content, headers=_named(pieces))

    @router.post("/v1/completions", responses=whole_or_stream(Completion))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue raw prompts, or score them; with ``stream`` as server-sent events."""
        all_pieces = await service.complete(body, _key(request))
        if body.stream:
            return _stream(all_pieces[0], openai_completions.events(all_pieces[0], body, service.base))
        answers = await while_connected(request.receive, all_answers(all_pieces))
        content = await asyncio.to_thread(openai_completions.completion, all_pieces, answers, body, service.base)
        return JSONResponse(content, headers=_named(all_pieces[0]))

    @router.get("/v1/models")
    async def models() -> Json:
        """The names that can be asked for, each with the hash of the weights that answer."""
        return openai_chat.model_list(service.adapters.variants(), started)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        """One of these names."""
        variant = service.adapters.variants().get(name)
        return openai_chat.model_card(name, variant or service.adapters.find(name), started)

    return router


def _tgi_routes(service: InferenceService) -> APIRouter:
    errors = error_responses(413, 422, 424, 429, body=TgiError)
    router = APIRouter(tags=["tgi"], route_class=route_with_errors(_tgi_error), responses=errors)

    async def whole(body: GenerateRequest, request: Request, wrap: Callable[[Json], Any]) -> Response:
        started = time.perf_counter()
        pieces = await service.generate(body, streaming=False, key=_key(request))
        answer = await while_connected(request.receive, pieces.answer())
        headers = tgi.answer_headers(pieces, time.perf_counter() - started) | _named(pieces)
        return JSONResponse(wrap(tgi.answer_body(pieces, answer, body)), headers=headers)

    async def streamed(body: GenerateRequest, request: Request) -> Response:
        pieces = await service.generate(body, streaming=True, key=_key(request))
        return _stream(pieces, tgi.events(pieces, body))

    @router.post("/generate", response_model=GenerateAnswer)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a raw prompt."""
        return await whole(body, request, lambda answer: answer)

    @router.post("/generate_stream", response_class=Response, responses=STREAM)
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Continue a raw prompt, one event for each token."""
        return await streamed(body, request)

    @router.post("/", responses=whole_or_stream(list[GenerateAnswer]))
    async def generate_either(body: GenerateRequest, request: Request) -> Response:
        """The route of Hugging Face's clients: ``stream`` picks; a whole answer comes in an array."""
        return await streamed(body, request) if body.stream else await whole(body, request, lambda answer: [answer])

    @router.get("/info")
    async def info() -> Json:
        """The model and the limits."""
        return tgi.info(service, version("fedward"))

    return router


def _adapter_routes(service: InferenceService) -> APIRouter:
    router = APIRouter(tags=["adapters"], responses=error_responses(400, 404, 409))
    adapters = service.adapters

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest) -> AdapterInfo:
        """Verify an adapter and let its name answer."""
        variant = await asyncio.to_thread(adapters.load, body)
        return AdapterInfo(lora_name=variant.name, sha256=variant.sha256)

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> AdapterInfo:
        """Forget an adapter; refused while it is the active release or the canary."""
        variant = await asyncio.to_thread(adapters.unload, body.lora_name)
        return AdapterInfo(lora_name=variant.name, sha256=variant.sha256)

    @router.get("/v1/release")
    async def release() -> Release:
        """What the served name answers with."""
        return adapters.release()

    @router.post("/v1/release")
    async def activate(body: ActivateRequest) -> Release:
        """Let the served name answer with a loaded adapter; the canary ends, and is promoted when it is this one."""
        return await asyncio.to_thread(adapters.activate, body.lora_name, body.sha256)

    @router.post("/v1/release/canary")
    async def canary(body: CanaryRequest) -> Release:
        """Let a loaded adapter answer a share of the requests for the served name."""
        return await asyncio.to_thread(adapters.start_canary, body)

    @router.post("/v1/release/rollback")
    async def rollback() -> Release:
        """End the canary; without one, go back to what the served name answered with before."""
        return await asyncio.to_thread(adapters.roll_back)

    return router


def _tgi_error(error: FedwardError) -> Response:
    status, body = tgi.error_body(error)
    return JSONResponse(body, status_code=status, headers={"retry-after": "1"} if status == 429 else None)


def _stream(pieces: Pieces, events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events; when it ends, however it ends, nobody waits for the answer any more."""
    done = BackgroundTask(pieces.generation.cancel)
    return StreamingResponse(events, media_type="text/event-stream", background=done, headers=_named(pieces))


def _key(request: Request) -> str | None:
    """What decides whether a canary answers: the request id, when the caller has given one."""
    return request.headers.get("x-request-id")


def _named(pieces: Pieces) -> dict[str, str]:
    """The header that names the weights that answer, in every protocol."""
    return {"x-fedward-adapter-sha256": pieces.generation.variant.sha256}
