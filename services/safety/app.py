"""Routes of the safety service."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Counter

from services.common.api_docs import error_responses
from services.common.app import create_app, route_with_errors
from services.common.connections import while_connected
from services.contracts.errors import FedwardError, RequestError, UnknownModel
from services.contracts.verdicts import ClassifierInfo, ClassifyItem, ClassifyRequest, ClassifyResponse, Verdict
from services.safety.backends import Backend
from services.safety.detectors import (
    ChatDetectionRequest,
    ContentAnalysis,
    ContentAnalysisRequest,
    Detection,
    DetectorError,
    GenerationDetectionRequest,
    content_detections,
    detector_error,
    findings,
)
from services.safety.items import read_item
from services.safety.moderation import ALIASES, ModerationRequest, moderation
from services.safety.settings import SafetySettings

ClassifyAll = Callable[[Request, list[ClassifyItem], str], Awaitable[list[Verdict]]]

VERDICTS = Counter("fedward_safety_verdicts_total", "Verdicts given", ["outcome"])


def build_app(settings: SafetySettings, backend: Backend) -> FastAPI:
    """The service around a classifier."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield
        await backend.aclose()

    app = create_app("safety", settings, lifespan=lifespan, ready=backend.ready)

    async def classify_all(request: Request, items: list[ClassifyItem], name: str) -> list[Verdict]:
        if len(items) > settings.max_items:
            raise RequestError(f"{name} holds {len(items)} items; at most {settings.max_items} are taken", param=name)
        conversations = [read_item(item, f"{name}.{i}") for i, item in enumerate(items)]
        verdicts = await while_connected(request.receive, backend.classify(conversations))
        for verdict in verdicts:
            VERDICTS.labels(verdict.outcome.value).inc()
        return verdicts

    @app.post("/v1/classify", response_model=ClassifyResponse)
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Classify prompts, prompts with responses, or conversations; one verdict for each, in order."""
        return ClassifyResponse(verdicts=await classify_all(request, body.items, "items"))

    @app.post("/v1/moderations")
    async def moderations(body: ModerationRequest, request: Request) -> dict[str, Any]:
        """OpenAI's moderation endpoint: each text is classified as a prompt."""
        info = backend.info()
        if body.model not in (*ALIASES, info.model_id):
            raise UnknownModel(f"no model {body.model!r}; there is {info.model_id}", param="model")
        if not body.texts():
            raise RequestError("input is empty; there is nothing to classify", param="input")
        verdicts = await classify_all(request, [ClassifyItem(prompt=text) for text in body.texts()], "input")
        return moderation(verdicts, info)

    @app.get("/v1/model", response_model=ClassifierInfo)
    async def model() -> ClassifierInfo:
        """Which classifier runs, at which thresholds, measured how."""
        return backend.info()

    app.include_router(_detector_routes(backend, classify_all))
    return app


def _detector_routes(backend: Backend, classify_all: ClassifyAll) -> APIRouter:
    """The guardrails orchestrator's detector API, which has an error body of its own."""
    errors = error_responses(413, 422, 429, 503, body=DetectorError)
    router = APIRouter(tags=["detector"], route_class=route_with_errors(_detector_error), responses=errors)

    @router.post("/api/v1/text/contents")
    async def contents(body: ContentAnalysisRequest, request: Request) -> list[list[ContentAnalysis]]:
        """What is found in each text."""
        verdicts = await classify_all(request, body.items(), "contents") if body.items() else []
        return content_detections(body, verdicts, backend.info().category_thresholds)

    @router.post("/api/v1/text/chat")
    async def chat(body: ChatDetectionRequest, request: Request) -> list[Detection]:
        """What is found in a conversation, judged by its last turn."""
        (verdict,) = await classify_all(request, [body.item()], "messages")
        return findings(verdict, backend.info().category_thresholds, body.threshold)

    @router.post("/api/v1/text/generation")
    async def generation(body: GenerationDetectionRequest, request: Request) -> list[Detection]:
        """What is found in a generated text, with the prompt that led to it."""
        (verdict,) = await classify_all(request, [body.item()], "generation")
        return findings(verdict, backend.info().category_thresholds, body.threshold)

    @router.get("/health")
    async def health() -> str:
        """The process runs."""
        return "ok"

    return router


def _detector_error(error: FedwardError) -> Response:
    told = detector_error(error)
    return JSONResponse(told.model_dump(), status_code=told.code)
