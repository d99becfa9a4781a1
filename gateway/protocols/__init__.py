"""The protocols that clients speak, one module each: read a request, read what upstream answers, write what leaves.

``pipeline.py`` knows them only by ``Wire``; each module of this package is one.
"""

from typing import Protocol

from gateway.answers import Event, Head, Sent, Unit
from gateway.asked import Asked
from gateway.settings import GatewaySettings
from services.contracts.chat import Json, Usage
from services.contracts.errors import FedwardError


class Wire(Protocol):
    """One protocol. The readers raise pydantic's ValidationError for what is no answer of this protocol."""

    @property
    def PATH(self) -> str:  # noqa: N802  (the modules' constants)
        """The inference service's route for whole answers."""

    @property
    def STREAM_PATH(self) -> str:  # noqa: N802
        """Its route for streams."""

    @property
    def ID_PREFIX(self) -> str:  # noqa: N802
        """How the ids of answers begin."""

    @property
    def END(self) -> str:  # noqa: N802
        """The data of the event that closes a stream; empty when there is none."""

    def read(self, raw: Json, settings: GatewaySettings, system_prompt: str | None = None) -> Asked:
        """The client's request; raises RequestError that names the field at fault.

        ``system_prompt`` is the operator's, put before the conversation where the protocol has conversations.
        """

    def read_whole(self, body: bytes, head: Head) -> Event:
        """A whole answer from upstream, to leave under ``head``."""

    def read_event(self, data: str, head: Head) -> Event:
        """One event of a streamed answer from upstream."""

    def whole(self, asked: Asked, head: Head, units: list[Unit], usage: Usage) -> Json:
        """The body of a whole answer, one unit for each choice."""

    def events(self, asked: Asked, head: Head, unit: Unit, sent: Sent) -> list[Json]:
        """The events of a stream for one unit; ``sent`` is what has left of its choice before."""

    def usage_events(self, head: Head, usage: Usage) -> list[Json]:
        """The events with the token counts, after the last choice has ended."""

    def error(self, error: FedwardError) -> tuple[int, Json]:
        """HTTP status and body of an error."""
