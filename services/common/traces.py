"""OpenTelemetry traces, on only when an OTLP endpoint is configured (extra ``tracing``)."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.common.spans import Span, Start, Value, trace_by

NOT_TRACED = "/health/,/metrics"  # asked every few seconds, by machines


def instrument(app: FastAPI, service: str, endpoint: str) -> None:
    """Trace incoming requests, outgoing httpx calls and ``spans.span``, exporting to ``endpoint``/v1/traces.

    The SDK's own environment variables hold too, for example ``OTEL_TRACES_SAMPLER``.
    """
    provider = TracerProvider(resource=Resource.create({"service.name": f"fedward-{service}"}))
    exporter = _WithoutMessages(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls=NOT_TRACED, exclude_spans=["receive", "send"]
    )
    HTTPXClientInstrumentor().instrument(tracer_provider=provider)
    trace_by(_starter(provider.get_tracer("fedward")))
    serving = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with serving(app) as state:
            yield state
        # Here and not at the process's exit: the signal that ends it leaves no time for that.
        await asyncio.to_thread(provider.shutdown)

    app.router.lifespan_context = lifespan


def _starter(tracer: trace.Tracer) -> Start:
    @contextmanager
    def start(name: str, attributes: Mapping[str, Value], outgoing: bool) -> Iterator[Span]:
        kind = SpanKind.CLIENT if outgoing else SpanKind.INTERNAL
        made = tracer.start_span(name, kind=kind, attributes=attributes)
        # An outgoing call may be read by a generator, whose context is that of whoever reads: it must not be current.
        current = (
            nullcontext() if outgoing else trace.use_span(made, record_exception=False, set_status_on_exception=False)
        )
        try:
            with current:
                yield _Traced(made)
        except BaseException as error:
            made.set_attribute("error.type", type(error).__name__)
            made.set_status(StatusCode.ERROR)
            raise
        finally:
            made.end()

    return start


class _Traced:
    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def note(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def headers(self) -> dict[str, str]:
        carried: dict[str, str] = {}
        propagate.inject(carried, trace.set_span_in_context(self._span))
        return carried


class _WithoutMessages(SpanExporter):
    """Leaves out events and descriptions: instrumentations put messages of errors there, which may quote a prompt."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_without_messages(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _without_messages(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
