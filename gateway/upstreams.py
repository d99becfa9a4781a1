"""The services behind the gateway. Every failure becomes one error that names the service and quotes nothing.

Nothing is quoted because the body of a failed answer may hold text that no verdict covers; only the error body of a
4xx is passed on, and that of the inference service only after a check (``pipeline.py``). A service that keeps failing
is left alone for a moment (``breaker.py``): its calls then fail at once, and no check is ever skipped.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from weakref import WeakValueDictionary

import httpx
from pydantic import ValidationError

from gateway.answers import Event, Head
from gateway.asked import Asked
from gateway.generations import generation
from gateway.metrics import CHECK_SECONDS
from gateway.policy import Direction
from gateway.protocols import Wire
from gateway.service import BODY_LIMIT, Service
from gateway.settings import GatewaySettings
from gateway.shared_calls import SharedCalls
from gateway.sse import DONE, EventTooLarge, SseParser
from services.common.spans import span
from services.contracts.chat import Json, TgiError
from services.contracts.critique import CritiqueItem, ReviseRequest, ReviseResponse, Revision
from services.contracts.errors import ErrorBody, ErrorDetail, FedwardError, UpstreamRejected, UpstreamUnavailable
from services.contracts.verdicts import ClassifyItem, ClassifyRequest, ClassifyResponse, Verdict

INFERENCE = "inference"
SAFETY = "safety"
CRITIQUE = "critique"
ADAPTER_HEADER = "x-fedward-adapter-sha256"


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
    """The inference, safety and critique services, asked; close it when the app ends."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._deadlines = {SAFETY: settings.check_deadline_ms / 1000, INFERENCE: settings.silence_seconds}
        self._generation_seconds = settings.generation_seconds
        self._silence_seconds = settings.silence_seconds
        self._revise_seconds = settings.revise_seconds
        urls = {INFERENCE: settings.inference_url, SAFETY: settings.safety_url, CRITIQUE: settings.critique_url}
        self._services = {name: Service(name, url, settings) for name, url in urls.items() if url}
        self._calls_at_once = settings.safety_calls_in_flight
        self._checks: WeakValueDictionary[str, SharedCalls] = WeakValueDictionary()  # by tenant

    async def close(self) -> None:
        """Close all kept connections."""
        for service in self._services.values():
            await service.close()

    async def problem(self, name: str, seconds: float) -> str | None:
        """Why a service cannot be asked at present: it says so itself, or it is left alone after failures."""
        service = self._services[name]
        try:
            async with _within(seconds, name):
                await _require_ready(service, seconds)
        except FedwardError as error:
            return error.message
        return f"{name}: {service.breaker.problem}" if service.breaker.problem else None

    async def classify(
        self, tenant: str, items: Sequence[ClassifyItem], direction: Direction, deadline_seconds: float
    ) -> list[Verdict]:
        """One verdict per item, within the deadline; raises UpstreamUnavailable for anything else.

        Tenants share no calls: one's slow texts, or texts that the classifier fails on, are not the others' trouble.
        """
        started = time.perf_counter()
        checks = self._checks.get(tenant)
        if checks is None:
            checks = self._checks[tenant] = SharedCalls(self._call_classifier, self._calls_at_once)
        try:
            return await checks.classify(items, deadline_seconds)
        except PassedOn as error:
            raise UpstreamUnavailable(SAFETY, f"answered HTTP {error.status} to a check") from error
        finally:
            CHECK_SECONDS.labels(direction.value).observe(time.perf_counter() - started)

    async def _call_classifier(self, items: Sequence[ClassifyItem], seconds: float) -> list[Verdict]:
        content = ClassifyRequest(items=list(items)).model_dump_json(exclude_none=True).encode()
        safety = self._services[SAFETY]
        with safety.breaker.watching(), _readable(SAFETY):
            answer = await self._fetch(safety, "POST", "/v1/classify", content, seconds)
            verdicts = ClassifyResponse.model_validate_json(answer).verdicts
            if len(verdicts) != len(items):
                raise UpstreamUnavailable(SAFETY, f"gave {len(verdicts)} verdicts on {len(items)} texts")
        return verdicts

    async def revise(self, item: CritiqueItem) -> Revision:
        """The critique service's revision of a draft, within ``revise_seconds``; raises UpstreamUnavailable."""
        content = ReviseRequest(items=[item]).model_dump_json().encode()
        critique = self._services[CRITIQUE]
        try:
            with critique.breaker.watching(), _readable(CRITIQUE):
                answer = await self._fetch(critique, "POST", "/v1/revise", content, self._revise_seconds)
                revisions = ReviseResponse.model_validate_json(answer).revisions
                if len(revisions) != 1:
                    raise UpstreamUnavailable(CRITIQUE, f"gave {len(revisions)} revisions of one draft")
        except PassedOn as error:
            raise UpstreamUnavailable(CRITIQUE, f"answered HTTP {error.status}") from error
        return revisions[0]

    async def forward(
        self, name: str, method: str, path: str, content: bytes | None = None, *, deadline_seconds: float | None = None
    ) -> bytes:
        """A small request that changes nothing, passed on as it is; returns the body of a 2xx.

        Raises:
            UpstreamUnavailable: no answer in time, 5xx, no proper answer at all, or too many of these in a row.
            PassedOn: the service answered 4xx.
        """
        service = self._services[name]
        try:
            with service.breaker.watching():
                return await self._fetch(service, method, path, content, deadline_seconds or self._deadlines[name])
        except PassedOn as refusal:
            if name == INFERENCE:  # its words are not checked here
                raise refusal.without_detail() from refusal
            raise

    async def about(self, name: str, path: str, seconds: float) -> bytes:
        """What a service says of itself; raises as ``forward`` does. No request needs it, so no breaker counts it."""
        return await self._fetch(self._services[name], "GET", path, None, seconds)

    async def complete(self, wire: Wire, asked: Asked) -> Event:
        """A whole answer; raises as ``forward`` does."""
        service, seconds = self._services[INFERENCE], self._generation_seconds
        with (
            service.breaker.watching(),
            generation(wire.PATH, asked.model, service.address) as told,
            _readable(INFERENCE),
        ):
            # The first byte of a whole answer comes when the answer is complete: a pause cannot be told from work.
            async with (
                _within(seconds, INFERENCE),
                service.open(
                    "POST", wire.PATH, asked.content, patience_seconds=seconds, headers=told.headers
                ) as response,
            ):
                await _require_success(service, response)
                body = await service.read(response)
            event = wire.read_whole(body, _head(wire, asked, response))
            told.take(event)
            return event

    async def stream(self, wire: Wire, asked: Asked) -> AsyncGenerator[Event, None]:
        """The events of a streamed answer, up to ``[DONE]`` or the end of the body; raises as ``forward`` does."""
        service, parser = self._services[INFERENCE], SseParser(BODY_LIMIT)
        path, patience = wire.STREAM_PATH, self._silence_seconds
        with (
            service.breaker.watching(),
            generation(path, asked.model, service.address) as told,
            _readable(INFERENCE, "sent an event that is not a part of an answer"),
        ):
            async with service.open(
                "POST", path, asked.content, patience_seconds=patience, headers=told.headers
            ) as response:
                await _require_success(service, response)
                head = _head(wire, asked, response)
                async for piece in response.aiter_raw():
                    for data in parser.feed(piece):
                        if data == DONE:
                            return
                        event = wire.read_event(data, head)
                        head = event.head
                        service.breaker.answering()
                        told.take(event)
                        yield event

    async def _fetch(self, service: Service, method: str, path: str, content: bytes | None, seconds: float) -> bytes:
        attributes = {"http.request.method": method, "url.path": path, **service.address}
        with span(f"{method} {path}", attributes, outgoing=True) as traced:
            async with (
                _within(seconds, service.name),
                service.open(
                    method, path, content, patience_seconds=seconds, headers=traced.headers(), again=True
                ) as response,
            ):
                traced.note({"http.response.status_code": response.status_code})
                await _require_success(service, response)
                return await service.read(response)


async def _require_ready(service: Service, seconds: float) -> None:
    """Ask whether a service is ready: ours say so at the first path; vLLM and TGI have only the second."""
    for path in ("/health/ready", "/health"):
        async with service.open("GET", path, None, patience_seconds=seconds, headers={}) as response:
            if response.status_code != 404 or path == "/health":
                await _require_success(service, response)
                return


async def _require_success(service: Service, response: httpx.Response) -> None:
    status = response.status_code
    if response.is_success:
        return
    if status < 400 or status >= 500:
        raise UpstreamUnavailable(service.name, f"answered HTTP {status}")
    raise PassedOn(service.name, status, _detail(await service.read(response)))


def _detail(body: bytes) -> ErrorDetail | None:
    """The error object of OpenAI's or TGI's error body; None for any other body: the status says it all."""
    with suppress(ValidationError):
        return ErrorBody.model_validate_json(body).error
    with suppress(ValidationError):
        error = TgiError.model_validate_json(body)
        return ErrorDetail(message=error.error, type=error.error_type, code=error.error_type)
    return None


def _head(wire: Wire, asked: Asked, response: httpx.Response) -> Head:
    """The answer's head; that of TGI's protocol tells by an HTTP header alone who writes."""
    return Head.own(wire.ID_PREFIX, asked.model).by(response.headers.get(ADAPTER_HEADER))


@contextmanager
def _readable(name: str, problem: str = "answered something unreadable") -> Iterator[None]:
    try:
        yield
    except (ValidationError, EventTooLarge) as error:
        raise UpstreamUnavailable(name, problem) from error


@asynccontextmanager
async def _within(seconds: float, name: str) -> AsyncIterator[None]:
    """A limit on a whole call: those of the transport start afresh with every byte."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise UpstreamUnavailable(name, "no answer within the deadline") from error
