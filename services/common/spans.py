"""Spans of what a process does, where tracing is on (``traces.py``); where it is off, next to nothing.

OpenTelemetry is an extra and is loaded only when a collector is configured, so nothing here imports it. Spans hold
names, counts and codes; never the text of a prompt or an answer, and never the message of an error, which may quote it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Value = str | int | float | bool | Sequence[str]


class Span(Protocol):
    """Something that is being traced. An error that ends its block is noted by the name of its class."""

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Add what has come to be known."""

    def headers(self) -> dict[str, str]:
        """What an outgoing call carries so that the service's own spans join the trace (W3C Trace Context)."""


class _Untraced:
    def note(self, attributes: Mapping[str, Value]) -> None:
        pass

    def headers(self) -> dict[str, str]:
        return {}


Start = Callable[[str, Mapping[str, Value], bool], AbstractContextManager[Span]]
_off: AbstractContextManager[Span] = nullcontext(_Untraced())
_start: Start | None = None


def span(name: str, attributes: Mapping[str, Value], *, outgoing: bool = False) -> AbstractContextManager[Span]:
    """Trace the block.

    Args:
        name: of few values, for example ``POST /v1/classify``.
        attributes: by OpenTelemetry's conventions; our own begin with ``fedward.``.
        outgoing: a call of another service. Other spans have the spans begun inside them below them.
    """
    return _start(name, attributes, outgoing) if _start else _off


def trace_by(start: Start) -> None:
    """From now on, begin spans so."""
    global _start
    _start = start
