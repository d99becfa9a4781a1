"""Routes of the safety service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import Counter

from services.common.app import create_app
from services.contracts.errors import RequestError, UnknownModel
from services.contracts.verdicts import ClassifierInfo, ClassifyItem, ClassifyRequest, ClassifyResponse, Verdict
from services.safety.classifier import SafetyModel
from services.safety.moderation import ALIASES, ModerationRequest, moderation
from services.safety.settings import SafetySettings
from services.safety.work_queue import WorkQueue

VERDICTS = Counter("fedward_safety_verdicts_total", "Verdicts given", ["outcome"])


def build_app(settings: SafetySettings, model: SafetyModel) -> FastAPI:
    """The service around a loaded model."""
    queue = WorkQueue(settings.queue_limit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        model.prompt_score("warm up")
        yield
        queue.close()

    app = create_app("safety", settings, lifespan=lifespan)

    async def classify_all(items: list[ClassifyItem], name: str) -> list[Verdict]:
        if len(items) > settings.max_items:
            raise RequestError(f"{name} holds {len(items)} items; at most {settings.max_items} are taken", param=name)
        verdicts = await queue.run(lambda: [model.classify(item, f"{name}.{i}") for i, item in enumerate(items)])
        for verdict in verdicts:
            VERDICTS.labels(verdict.outcome.value).inc()
        return verdicts

    @app.post("/v1/classify", response_model=ClassifyResponse)
    async def classify(body: ClassifyRequest) -> ClassifyResponse:
        """Classify prompts, prompts with responses, or conversations; one verdict for each, in order."""
        return ClassifyResponse(verdicts=await classify_all(body.items, "items"))

    @app.post("/v1/moderations")
    async def moderations(body: ModerationRequest) -> dict[str, Any]:
        """OpenAI's moderation endpoint: each text is classified as a prompt."""
        if body.model not in (*ALIASES, model.manifest.model_id):
            raise UnknownModel(f"no model {body.model!r}; there is {model.manifest.model_id}", param="model")
        if not body.texts():
            raise RequestError("input is empty; there is nothing to classify", param="input")
        verdicts = await classify_all([ClassifyItem(prompt=text) for text in body.texts()], "input")
        return moderation(verdicts, model.manifest.model_id)

    @app.get("/v1/model", response_model=ClassifierInfo)
    async def info() -> ClassifierInfo:
        """Which classifier runs, at which threshold, measured how."""
        return model.info()

    return app
