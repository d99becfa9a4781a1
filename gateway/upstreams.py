"""The two services behind the gateway. Every failure becomes one error that names the service and quotes nothing.

Nothing is quoted because the body of a failed answer may hold text that no verdict covers; only the error body of a
4xx is passed on, and that of the inference service only after a check (``pipeline.py``). Each service has one client
that lives as long as the app (a new one per request costs 20 times as much).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from pydantic import ValidationError

from gateway.answers import Event
from gateway.metrics import CHECK_SECONDS, UPSTREAM_CANCELLATIONS
from gateway.policy import Direction
from gateway.settings import GatewaySettings
from gateway.sse import DONE, EventTooLarge, SseParser
from gateway.transport import fast_transport
from services.common.http import unavailable
from services.contracts.chat import Json, TgiError
from services.contracts.errors import ErrorBody, ErrorDetail, FedwardError, UpstreamRejected, UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, ClassifyRequest, ClassifyResponse, Verdict

INFERENCE = "inference"
SAFETY = "safety"
_BODY_LIMIT = 4_000_000
_JSON = {"content-type": "application/json"}
_CALLS: set[asyncio.Task[bytes]] = set()  # also those that were given up: the event loop does not keep them alive
# Shorter than the 5 s after which uvicorn closes an idle connection: a kept one must not die as it is taken.
_KEEPALIVE_SECONDS = 2.0


class PassedOn(UpstreamRejected):
    """A service refused the client's request: the client gets the same status, and the error body if it is proper."""

    def __init__(self, upstream: str, status: int, detail: ErrorDetail | None = None) -> None:
        super().__init__(upstream, f"answered HTTP {status}")
        self.status = status
        self.detail = detail

    def body(self) -> Json:
        """The service's own error body where it gave one."""
        return ErrorBody(error=self.detail).model_dump() if self.detail else super().body()

    def words(self) -> str:
        """All text of the service's error body."""
        return "\n".join(str(value) for value in self.detail.model_dump().values() if value) if self.detail else ""

    def without_detail(self) -> "PassedOn":
        """The same refusal in our own words."""
        return PassedOn(self.upstream, self.status)


def status_of(error: FedwardError) -> int:
    """The HTTP status that tells a client of an error."""
    return error.status if isinstance(error, PassedOn) else error.http_status


class Upstreams:
    """Clients of the inference and safety services; close them when the app ends."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._deadlines = {SAFETY: settings.check_deadline_ms / 1000, INFERENCE: settings.silence_seconds}
        self._generation_seconds = settings.generation_seconds
        self._timeout = httpx.Timeout(settings.silence_seconds, connect=settings.connect_seconds, pool=None)
        # The first byte of a whole answer comes when the answer is complete: a pause cannot be told from work.
        self._patient = httpx.Timeout(settings.generation_seconds, connect=settings.connect_seconds, pool=None)
        self._clients = {
            name: httpx.AsyncClient(base_url=str(url), transport=fast_transport(_KEEPALIVE_SECONDS), trust_env=False)
            for name, url in ((INFERENCE, settings.inference_url), (SAFETY, settings.safety_url))
        }

    async def close(self) -> None:
        """Close all kept connections."""
        for client in self._clients.values():
            await client.aclose()

    async def classify(
        self, items: Sequence[ClassifyItem], direction: Direction, deadline_seconds: float
    ) -> list[Verdict]:
        """One verdict per item, within the deadline; raises UpstreamUnavailable for anything else."""
        content = ClassifyRequest(items=list(items)).model_dump_json(exclude_none=True).encode()
        started = time.perf_counter()
        try:
            answer = await self.forward(SAFETY, "POST", "/v1/classify", content, deadline_seconds=deadline_seconds)
            verdicts = ClassifyResponse.model_validate_json(answer).verdicts
        except PassedOn as error:
            raise UpstreamUnavailable(SAFETY, f"answered HTTP {error.status} to a check") from error
        except ValidationError as error:
            raise UpstreamUnavailable(SAFETY, "answered something unreadable") from error
        finally:
            CHECK_SECONDS.labels(direction.value).observe(time.perf_counter() - started)
        if len(verdicts) != len(items):
            raise UpstreamUnavailable(SAFETY, f"gave {len(verdicts)} verdicts on {len(items)} texts")
        return verdicts

    async def forward(
        self, name: str, method: str, path: str, content: bytes | None = None, *, deadline_seconds: float | None = None
    ) -> bytes:
        """A small request passed on as it is; returns the body of a 2xx.

        Raises:
            UpstreamUnavailable: no answer in time, 5xx, or no proper answer at all.
            PassedOn: the service answered 4xx.
        """

        async def call() -> bytes:
            async with self._open(name, method, path, content) as response:
                return await _read(name, response)

        return await _within(deadline_seconds or self._deadlines[name], name, call())

    async def complete(self, path: str, content: bytes, read: Callable[[bytes], Event]) -> Event:
        """A whole answer, as ``read`` reads it; raises as ``forward`` does."""

        async def call() -> bytes:
            async with self._open(INFERENCE, "POST", path, content, self._patient) as response:
                return await _read(INFERENCE, response)

        async with _counted():
            body = await _within(self._generation_seconds, INFERENCE, call())
        try:
            return read(body)
        except ValidationError as error:
            raise UpstreamUnavailable(INFERENCE, "answered something unreadable") from error

    async def stream(self, path: str, content: bytes, read: Callable[[str], Event]) -> AsyncGenerator[Event, None]:
        """The events of a streamed answer, up to ``[DONE]`` or the end of the body; raises as ``forward`` does."""
        parser = SseParser(_BODY_LIMIT)
        try:
            async with _counted(), self._open(INFERENCE, "POST", path, content) as response:
                async for piece in response.aiter_bytes():
                    for data in parser.feed(piece):
                        if data == DONE:
                            return
                        yield read(data)
        except (ValidationError, EventTooLarge) as error:
            raise UpstreamUnavailable(INFERENCE, "sent an event that is not a part of an answer") from error

    @asynccontextmanager
    async def _open(
        self, name: str, method: str, path: str, content: bytes | None, patience: httpx.Timeout | None = None
    ) -> AsyncIterator[httpx.Response]:
        """An answer of status 2xx, its body still to be read; leaving early closes the connection."""
        request = self._clients[name].stream(
            method, path, content=content, headers=_JSON, timeout=patience or self._timeout
        )
        try:
            async with request as response:
                if not response.is_success:
                    await _raise_for(name, response)
                yield response
        except httpx.RequestError as error:
            raise unavailable(name, error) from error


async def _read(name: str, response: httpx.Response) -> bytes:
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > _BODY_LIMIT:
            raise UpstreamUnavailable(name, f"answered more than {_BODY_LIMIT} bytes")
    return b"".join(pieces)


async def _raise_for(name: str, response: httpx.Response) -> None:
    status = response.status_code
    if status < 400 or status >= 500:
        raise UpstreamUnavailable(name, f"answered HTTP {status}")
    raise PassedOn(name, status, _detail(await _read(name, response)))


def _detail(body: bytes) -> ErrorDetail | None:
    """The error object of OpenAI's or TGI's error body; None for any other body: the status says it all."""
    with suppress(ValidationError):
        return ErrorBody.model_validate_json(body).error
    with suppress(ValidationError):
        error = TgiError.model_validate_json(body)
        return ErrorDetail(message=error.error, type=error.error_type, code=error.error_type)
    return None


async def _within(seconds: float, name: str, call: Coroutine[Any, Any, bytes]) -> bytes:
    """Make a call in a task of its own; give it up after ``seconds``, or when whoever waits for it is cancelled.

    The limit is on the whole call: httpx's own limits start afresh with every byte. A call is cancelled once and then
    left alone: httpx that is cancelled again while it closes a connection leaves it open for ever.
    """
    task = asyncio.create_task(call)
    _CALLS.add(task)
    task.add_done_callback(_ended)
    try:
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            raise UpstreamUnavailable(name, "no answer within the deadline")
        return task.result()
    finally:
        task.cancel()


def _ended(task: asyncio.Task[bytes]) -> None:
    _CALLS.discard(task)
    if not task.cancelled():
        task.exception()  # of a call that was given up nobody asks for it, and asyncio would complain of that


@asynccontextmanager
async def _counted() -> AsyncIterator[None]:
    """Count a generation that is given up before its end."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        UPSTREAM_CANCELLATIONS.inc()
        raise
