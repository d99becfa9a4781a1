"""Requests that are watched while they are at work: what has been decided on them, what is held and what has left.

A watcher comes before its request and names the id that the request will have; it sees the request of its own tenant
and of no other. It looks at the visit ten times a second, so that the request itself knows of nobody and waits for
nobody. What is watched lives in this process: behind several replicas a watcher may wait at the wrong one.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.visits import Visit
from services.contracts.chat import Json

LOOK_SECONDS = 0.1
LOOKS_WITHOUT_VISIT = 100
MOST_WATCHED = 100  # of each tenant


@dataclass(eq=False)
class _Watched:
    visit: Visit | None = None
    over: bool = False


class LiveVisits:
    """The visits that are watched, by tenant and request id."""

    def __init__(self) -> None:
        self._watched: dict[tuple[str, str], _Watched] = {}

    @contextmanager
    def at_work(self, visit: Visit) -> Iterator[None]:
        """Show a visit to its watcher, if it has one, for as long as the block runs."""
        watched = self._watched.get((visit.identity.tenant, visit.request_id), _Watched())
        watched.visit = visit
        try:
            yield
        finally:
            watched.over = True

    async def watch(self, tenant: str, request_id: str) -> AsyncGenerator[Json, None]:
        """What becomes of a request: an event at once, one for every change, and the last when it is over.

        Each has ``state`` (``waiting``, ``working``, ``over``), the characters ``held`` and ``released`` so far, and
        the ``decisions`` since the event before. It is over at once when too many of the tenant's are watched, or
        this one already is.
        """
        key = (tenant, request_id)
        if key in self._watched or sum(of == tenant for of, _ in self._watched) >= MOST_WATCHED:
            yield _event("over")
            return
        watched = self._watched[key] = _Watched()
        try:
            yield _event("waiting")
            looks, told, before = 0, 0, _event("working")
            while not watched.over and (watched.visit or looks < LOOKS_WITHOUT_VISIT):
                await asyncio.sleep(LOOK_SECONDS)
                looks += 1
                state = _event("working", watched.visit, told)
                if state != before:
                    yield state
                    told += len(state["decisions"])
                    before = state | {"decisions": []}
            yield _event("over", watched.visit, told)
        finally:
            del self._watched[key]


def _event(state: str, visit: Visit | None = None, told: int = 0) -> Json:
    return {
        "state": state,
        "held": sum(visit.held.values()) if visit and state == "working" else 0,  # what is held at the end never leaves
        "released": sum(map(len, visit.released)) if visit else 0,
        "decisions": [entry.model_dump(mode="json") for entry in visit.decisions[told:]] if visit else [],
    }
