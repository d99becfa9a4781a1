"""The critique service's routes: parse, call one function, map the result."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from fastapi import FastAPI, Request
from pydantic import BaseModel

from services.common.app import create_app
from services.common.connections import while_connected
from services.contracts.constitution import Constitution
from services.contracts.critique import (
    CritiqueRequest,
    CritiqueResponse,
    PreferRequest,
    PreferResponse,
    ReviseRequest,
    ReviseResponse,
)
from services.contracts.errors import Overloaded, RequestError
from services.critique.backend import TextModel
from services.critique.prefer import prefer_answers
from services.critique.revise import critique_drafts, revise_drafts
from services.critique.settings import CritiqueSettings


class Room:
    """Bounds the items of one request and of all requests in work together."""

    def __init__(self, settings: CritiqueSettings) -> None:
        self._one_request = settings.max_items
        self._together = settings.max_waiting_items
        self._taken = 0

    @contextmanager
    def take(self, items: Sequence[BaseModel]) -> Iterator[None]:
        """Hold places for a request's items; raises RequestError or Overloaded when they are too many."""
        if len(items) > self._one_request:
            raise RequestError(f"items: {len(items)} items; one request may have {self._one_request}", param="items")
        if self._taken + len(items) > self._together:
            raise Overloaded(f"{self._taken} items are in work, and {self._together} is the limit; try again later")
        self._taken += len(items)
        try:
            yield
        finally:
            self._taken -= len(items)


def build_app(settings: CritiqueSettings, constitution: Constitution, model: TextModel) -> FastAPI:
    """The service as an ASGI app."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await model.close()

    app = create_app("critique", settings, lifespan=lifespan, ready=model.ready)
    room = Room(settings)

    @app.post("/v1/critique")
    async def critique(body: CritiqueRequest, request: Request) -> CritiqueResponse:
        """Comment on drafts."""
        with room.take(body.items):
            work = critique_drafts(body.items, constitution, model, settings.critique_tokens)
            return CritiqueResponse(critiques=await while_connected(request.receive, work))

    @app.post("/v1/revise")
    async def revise(body: ReviseRequest, request: Request) -> ReviseResponse:
        """Critique drafts and revise those in which a problem was found."""
        with room.take(body.items):
            work = revise_drafts(
                body.items,
                constitution,
                model,
                critique_tokens=settings.critique_tokens,
                revision_tokens=settings.revision_tokens,
            )
            return ReviseResponse(revisions=await while_connected(request.receive, work))

    @app.post("/v1/prefer")
    async def prefer(body: PreferRequest, request: Request) -> PreferResponse:
        """Compare two answers, in both orders."""
        with room.take(body.items):
            work = prefer_answers(body.items, constitution, model)
            return PreferResponse(preferences=await while_connected(request.receive, work))

    @app.get("/v1/constitution")
    async def read_constitution() -> Constitution:
        """The principles in force, with the file's sha256."""
        return constitution

    return app
