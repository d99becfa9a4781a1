"""The app factory: what every Fedward HTTP process has in common, and how it is served.

Health at ``/health/live`` and ``/health/ready``, Prometheus at ``/metrics``, one JSON error body, a limit on the
request body, a request id on every answer, traces when a collector is configured.
"""

import asyncio
import gc
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services.common.api_docs import error_responses
from services.common.connections import CLIENT_LEFT, ClientLeft, allow_many_connections
from services.common.garbage import collect_less_garbage, forget_frames
from services.common.logs import configure_logs, get_logger
from services.common.metrics import TASKS
from services.common.middleware import BodyLimit, Observe
from services.common.request_head import BoundedHead
from services.common.settings import Settings
from services.contracts.errors import ConfigError, FedwardError, Overloaded, RequestError, UpstreamUnavailable

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Ready = Callable[[], Awaitable[str | None]]

FEW_REQUESTS = 32  # with so many open a full collection is a small part of what a check may take


def create_app(
    service: str, settings: Settings, *, lifespan: Lifespan | None = None, ready: Ready | None = None
) -> FastAPI:
    """A FastAPI app with Fedward's common parts.

    Args:
        service: short name, for logs, metrics and traces.
        settings: the process's settings.
        lifespan: start-up and shutdown of the process's own parts.
        ready: answers None when the process can serve, else the reason why it cannot.
    """
    app = FastAPI(title=f"Fedward {service}", version="1", lifespan=lifespan, responses=error_responses())
    for kind in (FedwardError, RequestValidationError, UnicodeEncodeError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientLeft, _on_client_left)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(BodyLimit, limit_bytes=settings.body_limit_bytes)
    app.add_middleware(Observe, service=service)

    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """The process runs."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], responses={503: {"description": "It cannot; `reason` says why."}})
    async def is_ready() -> Response:
        """The process can serve; 503 with the reason when it cannot."""
        reason = await ready() if ready else None
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)

    @app.get("/metrics", tags=["health"], include_in_schema=False)
    async def metrics() -> Response:
        TASKS.set(len(asyncio.all_tasks()))
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def serve(app: FastAPI, settings: Settings, service: str) -> None:
    """Serve until SIGTERM or SIGINT, then let in-flight requests finish.

    Raises:
        ConfigError: the port is taken or the address cannot be bound.
    """
    configure_logs(settings.log_level, service)
    allow_many_connections()
    if settings.otlp_endpoint:
        from services.common.traces import instrument

        instrument(app, service, settings.otlp_endpoint)
    collect_less_garbage()
    listener = _bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    get_logger().info("listening", host=host, port=port)
    config = uvicorn.Config(
        app,
        http=BoundedHead,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        server_header=False,
    )
    server = TidyServer(config)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(3)


class TidyServer(uvicorn.Server):
    """Collects all garbage once a minute, unless many requests are open (``garbage.py``)."""

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 600 == 0 and len(self.server_state.tasks) <= FEW_REQUESTS:
            gc.collect()
        return await super().on_tick(counter)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port", param="port"
        ) from error
    return listener


def as_fedward_error(request: Request, error: Exception) -> FedwardError:
    """The error that a caller is told of: a deliberate one as it is, one of FastAPI's or Python's in our words."""
    if isinstance(error, FedwardError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid_request(request, error)
    if isinstance(error, UnicodeEncodeError):  # JSON can hold half a surrogate pair, which has no bytes
        return RequestError("the request is not valid Unicode: it holds one half of a surrogate pair")
    # FastAPI's HTTPException of a body that cannot be read hides the reason, which may be a deliberate one.
    cause = error.__cause__
    return cause if isinstance(cause, FedwardError) else RequestError("the request body is not valid JSON")


def _invalid_request(request: Request, error: RequestValidationError) -> RequestError:
    """The field at fault by name; its value is left out, since it may be prompt text."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError("the request body is not valid JSON")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    if param is None and "json" not in request.headers.get("content-type", ""):
        return RequestError("body: not read as JSON; send it with the header 'content-type: application/json'")
    return RequestError(f"{param or 'body'}: {first['msg']}", param=param)


def route_with_errors(respond: Callable[[FedwardError], Response]) -> type[APIRoute]:
    """A class of routes whose errors ``respond`` puts into another protocol's shape than Fedward's."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_with_errors(request: Request) -> Response:
                try:
                    return await handle(request)
                except (FedwardError, RequestValidationError, UnicodeEncodeError, HTTPException) as error:
                    told = as_fedward_error(request, error)
                    forget_frames(error)
                    return respond(told)

            return handle_with_errors

    return Route


async def _on_error(request: Request, error: Exception) -> Response:
    """The one JSON error body, with ``Retry-After`` where a retry may help."""
    told = as_fedward_error(request, error)
    forget_frames(error)
    retry = {"retry-after": "1"} if isinstance(told, (Overloaded, UpstreamUnavailable)) else {}
    return JSONResponse(told.body(), status_code=told.http_status, headers=retry | told.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the body could not be read
        return await _on_error(request, error)
    refusal = RequestError(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.body(), status_code=error.status_code, headers=error.headers)


async def _on_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _on_bug(request: Request, error: Exception) -> Response:
    get_logger().error("unexpected error", path=request.url.path, exc_info=error)
    return JSONResponse(FedwardError("internal error; the log has the details").body(), status_code=500)
