"""An OpenTelemetry collector on a real socket that keeps the spans it is sent (OTLP over HTTP, protobuf)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Received(NamedTuple):
    """One span; ``failed`` says that its status is an error."""

    service: str
    name: str
    kind: int
    trace_id: bytes
    id: bytes
    parent_id: bytes
    failed: bool
    attributes: dict[str, Any]


class OtlpReceiver:
    """What has come: ``raw`` bodies, and the spans in them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.raw: list[bytes] = []

    def spans(self) -> list[Received]:
        found = []
        for body in list(self.raw):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = _read(resource.resource.attributes)["service.name"]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    ids = span.trace_id, span.span_id, span.parent_span_id
                    failed = span.status.code == span.status.STATUS_CODE_ERROR
                    found.append(Received(service, span.name, span.kind, *ids, failed, _read(span.attributes)))
        return found


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            receiver.raw.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = OtlpReceiver(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join(timeout=5)


def _read(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
