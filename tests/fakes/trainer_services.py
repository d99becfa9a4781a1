"""A safety, a critique and an inference service for the trainer's tests: one real HTTP server with trivial answers.

The fake classifier goes by marker words, which are harmless: a response with ``BAD`` is unsafe, one with
``UNSCORABLE`` cannot be scored. The fake critic finds a problem with every draft that holds ``BAD``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.requests import Request

from services.contracts.adapters import (
    ActivateRequest,
    AdapterInfo,
    LoadAdapterRequest,
    Release,
    UnloadAdapterRequest,
    read_manifest,
)
from services.contracts.chat import ChatChoice, ChatCompletion, ChatMessage, ChatRequest, Usage
from services.contracts.critique import Critique, CritiqueItem, ReviseRequest, ReviseResponse, Revision
from services.contracts.verdicts import (
    CalibrationInfo,
    ClassifierInfo,
    ClassifyRequest,
    ClassifyResponse,
    Outcome,
    Verdict,
)
from tests.fakes.gateway_upstreams import serving

BAD = "xylophonist"
STUBBORN = "stubborn"  # a draft with this word stays bad when it is revised
EMPTY = "hollow"  # a revision of a draft with this word fails the critic's own checks
UNSCORABLE = "enigma"
UNREADABLE = "garbled"
CONSTITUTION = "c" * 64


@dataclass
class FakeServices:
    """What the server does and has seen; ``fail_paths`` gives the status that a path answers with."""

    url: str = ""
    fail_paths: dict[str, int] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    asked_models: set[str] = field(default_factory=set)
    threshold: float = 0.5
    response_threshold: float = 0.5
    threshold_step: float = 0.0
    calibration: CalibrationInfo | None = None
    answers_left_out: int = 0

    def calls(self, path: str) -> int:
        """How often a path was called."""
        return self.seen.count(path)


@contextmanager
def trainer_services() -> Iterator[FakeServices]:
    """Serve the fakes for as long as the block lasts."""
    state = FakeServices()
    with serving(build_app(state)) as url:
        state.url = url
        yield state


def judge(response: str) -> Outcome:
    """The fake classifier's rule."""
    if UNSCORABLE in response:
        return Outcome.UNSCORED
    return Outcome.UNSAFE if BAD in response else Outcome.SAFE


def revise(item: CritiqueItem) -> Revision:
    """The fake critic's rule."""
    unreadable = UNREADABLE in item.draft
    problem = None if unreadable else BAD in item.draft
    critique = Critique(
        critique="Problem: it is bad." if problem else "No problem: it is fine.",
        problem=problem,
        principle_id="safe-and-useful",
        constitution_sha256=CONSTITUTION,
        model_id="fake-critic",
    )
    if not problem:
        return Revision(revision=item.draft, revised=False, critique=critique)
    if EMPTY in item.draft:
        return Revision(revision="", revised=True, rejected_because="empty", critique=critique)
    revision = f"still {BAD}" if STUBBORN in item.draft else "I would rather help with something safe."
    return Revision(revision=revision, revised=True, critique=critique)


def build_app(state: FakeServices) -> FastAPI:
    """The three services' routes, as far as the trainer calls them."""
    app = FastAPI()

    @app.middleware("http")
    async def record(request: Request, call_next: Any) -> Any:
        state.seen.append(request.url.path)
        return await call_next(request)

    def may_fail(path: str) -> None:
        if path in state.fail_paths:
            raise HTTPException(state.fail_paths[path], detail="asked to fail")

    @app.get("/v1/model")
    async def model() -> ClassifierInfo:
        may_fail("/v1/model")
        return ClassifierInfo(
            model_id="fake-filter",
            tier="fake",
            sha256="f" * 64,
            threshold=state.threshold,
            calibration=state.calibration,
            response_threshold=state.response_threshold,
        )

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> ClassifyResponse:
        may_fail("/v1/classify")
        state.threshold += state.threshold_step
        outcomes = [judge(item.response or "") for item in body.items]
        verdicts = [Verdict(outcome=outcome, model_id="fake-filter") for outcome in outcomes]
        return ClassifyResponse(verdicts=verdicts[state.answers_left_out :])

    @app.get("/v1/constitution")
    async def constitution() -> dict[str, str]:
        return {"id": "fake", "sha256": CONSTITUTION}

    @app.post("/v1/revise")
    async def revise_all(body: ReviseRequest) -> ReviseResponse:
        may_fail("/v1/revise")
        return ReviseResponse(revisions=[revise(item) for item in body.items][state.answers_left_out :])

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterRequest) -> AdapterInfo:
        may_fail("/v1/load_lora_adapter")
        manifest = read_manifest(Path(body.lora_path), body.sha256)
        state.loaded[body.lora_name] = manifest.sha256
        return AdapterInfo(lora_name=body.lora_name, sha256=manifest.sha256)

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterRequest) -> AdapterInfo:
        return AdapterInfo(lora_name=body.lora_name, sha256=state.loaded.pop(body.lora_name))

    @app.post("/v1/release")
    async def activate(body: ActivateRequest) -> Release:
        may_fail("/v1/release")
        return Release(served_model="fedward", adapter=body.lora_name, sha256=state.loaded[body.lora_name])

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> ChatCompletion:
        may_fail("/v1/chat/completions")
        state.asked_models.add(body.model)
        answer = ChatMessage(role="assistant", content=f"An answer on: {body.messages[-1].content}")
        usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        choices = [ChatChoice(message=answer, finish_reason="stop")]
        return ChatCompletion(id="1", created=0, model=body.model, choices=choices, usage=usage)

    return app
