"""What is told of each generation, by OpenTelemetry's conventions for generative AI: a span and two histograms.

Source: https://github.com/open-telemetry/semantic-conventions-genai (spans and metrics of clients), in Prometheus with
underscores and the unit. Prompts and answers, which the conventions allow, are left out.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import Histogram

from gateway.answers import Event, Head
from gateway.metrics import UPSTREAM_CANCELLATIONS
from services.common.spans import Span, Value, span
from services.contracts.chat import Usage

PROVIDER = "fedward"
_SECONDS = Histogram(
    "gen_ai_client_operation_duration_seconds",
    "Time from asking the inference service to the end of its answer; error_type is empty for a whole answer",
    ["gen_ai_operation_name", "gen_ai_request_model", "error_type"],
    buckets=tuple(0.01 * 2**i for i in range(14)),
)
_TOKENS = Histogram(
    "gen_ai_client_token_usage",
    "Tokens of one answer and its prompt, where the inference service counts them",
    ["gen_ai_operation_name", "gen_ai_request_model", "gen_ai_token_type"],
    buckets=tuple(4**i for i in range(14)),
)


class Generation:
    """What has come of one generation so far."""

    def __init__(self, traced: Span) -> None:
        self.headers = traced.headers()
        self.head: Head | None = None
        self.usage: Usage | None = None
        self.reasons: dict[int, str] = {}

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        self.head = self.head or event.head
        self.usage = event.usage or self.usage
        for index, finish in event.finishes.items():
            self.reasons[index] = finish.reason

    def attributes(self) -> dict[str, Value]:
        """What a span says of the answer."""
        told: dict[str, Value] = {}
        if self.head:
            told |= {"gen_ai.response.model": self.head.model, "gen_ai.response.id": self.head.id}
            if self.head.system_fingerprint:
                told["fedward.adapter_sha256"] = self.head.system_fingerprint
        if self.usage:
            told["gen_ai.usage.input_tokens"] = self.usage.prompt_tokens
            told["gen_ai.usage.output_tokens"] = self.usage.completion_tokens
        if self.reasons:
            told["gen_ai.response.finish_reasons"] = [self.reasons[index] for index in sorted(self.reasons)]
        return told


@contextmanager
def generation(path: str, model: str, address: Mapping[str, Value]) -> Iterator[Generation]:
    """Tell of the generation inside the block.

    Args:
        path: the route that is asked.
        model: the name that is asked for.
        address: where the inference service is, as spans say it.
    """
    operation = "chat" if path == "/v1/chat/completions" else "text_completion"
    asked: dict[str, Value] = {"gen_ai.operation.name": operation, "gen_ai.request.model": model}
    started, error_type = time.perf_counter(), ""
    with span(f"{operation} {model}", {**asked, **address, "gen_ai.provider.name": PROVIDER}, outgoing=True) as traced:
        told = Generation(traced)
        try:
            yield told
        except BaseException as error:
            error_type = type(error).__name__
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                UPSTREAM_CANCELLATIONS.inc()
            raise
        finally:
            traced.note(told.attributes())
            _SECONDS.labels(operation, model, error_type).observe(time.perf_counter() - started)
            if told.usage:
                _TOKENS.labels(operation, model, "input").observe(told.usage.prompt_tokens)
                _TOKENS.labels(operation, model, "output").observe(told.usage.completion_tokens)
