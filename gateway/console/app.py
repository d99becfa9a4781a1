"""The console's routes: a page that anybody may load, and its data, for which the caller has to be identified."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse

from gateway.admission import Admission
from gateway.auth import Identity
from gateway.console.views import RECORD_ID, Views
from gateway.policy_file import Route
from gateway.sse import encode
from services.contracts.chat import Json

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
REQUEST_ID = r"^[ -~]{1,128}$"
# The page loads its own files, talks to its own gateway, and cannot turn text into markup, whatever a model answers.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
UNCACHED = {"cache-control": "no-store", "x-accel-buffering": "no"}


def console_routes(admission: Admission, views: Views) -> APIRouter:
    """The page at ``/console``, its files beside it, and its data under ``/console/api``."""
    router = APIRouter(include_in_schema=False)
    router.include_router(_page())

    async def who(request: Request) -> Identity:
        return (await admission.visit(request.headers, request.state.request_id, Route.CHAT)).identity

    @router.get("/console/api/session", response_model=None)
    async def session(caller: Annotated[Identity, Depends(who)]) -> Json:
        """Who the caller is, and what it may ask for."""
        return views.session(caller)

    @router.get("/console/api/decisions", response_model=None)
    async def decisions(
        caller: Annotated[Identity, Depends(who)],
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[str | None, Query(pattern=RECORD_ID)] = None,
    ) -> Json:
        """A page of the records of the caller's tenant, the latest first."""
        return await views.decisions(caller.tenant, limit, before)

    @router.get("/console/api/decisions/stream", response_model=None)
    async def live(
        request_id: Annotated[str, Query(pattern=REQUEST_ID)], caller: Annotated[Identity, Depends(who)]
    ) -> Response:
        """Server-sent events on one request of the caller's tenant, which is to be sent after the first of them."""
        events = admission.live.watch(caller.tenant, request_id)
        return StreamingResponse(_encoded(events), media_type="text/event-stream", headers=UNCACHED)

    @router.get("/console/api/policy", response_model=None)
    async def policy(caller: Annotated[Identity, Depends(who)]) -> Json:
        """The policies in force for the caller's tenant."""
        return views.policies(caller.tenant)

    @router.get("/console/api/health", response_model=None)
    async def health(_: Annotated[Identity, Depends(who)]) -> Json:
        """Whether the gateway can serve, by what release, and what is amiss."""
        return await views.health()

    return router


def _page() -> APIRouter:
    """The page and its files, read once."""
    router = APIRouter()
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in STATIC.iterdir()}

    @router.get("/console/{name}")
    @router.get("/console")
    async def file(name: str = "index.html") -> Response:
        if name not in files:
            raise HTTPException(404, "the console has no such file")
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers=HEADERS)

    return router


async def _encoded(events: AsyncGenerator[Json, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        async for event in events:
            yield encode(event)
