"""Connections: as many as the system allows, and work that is given up when the client who waits for it goes away."""

import asyncio
import resource
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")
CLIENT_LEFT = 499  # nginx's status for it: nobody reads it, but it shows in the metrics


def allow_many_connections() -> None:
    """Raise this process's limit on open files to the highest it may have: many shells begin with 1,024 of 500,000."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls its limit infinite and refuses that number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class ClientLeft(Exception):
    """The client has closed the connection before its answer was made."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` as long as the client is there; when it goes, the work is cancelled.

    Raises:
        ClientLeft: the client went first.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        del working, leaving  # an error holds this frame: it must not hold the error's task (``garbage.py``)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
