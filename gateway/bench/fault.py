"""Fault test: the classifier or the model fails in every way; does unsafe text pass, and does the client learn of it?

The mock model's answer always contains the marker, so any pass-through shows.
"""

import asyncio
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import aiohttp

from gateway.bench.client import ask
from gateway.bench.gateways import Gateway, describe, is_good
from gateway.bench.script import MARKER, Fault, Script
from gateway.bench.services import MockServices

RECOVERY_SECONDS = 40.0
LEAVE_AFTER = 0.4
UNSAFE = Script(words=60, word_seconds=0.003, sentences=False, marker_at=25)
FAULTS: tuple[Fault, ...] = tuple(fault for fault in get_args(Fault) if fault)
QUICK = ("classifier_down", "answer_check_500", "upstream_500_stream")


class Case(NamedTuple):
    """A name, and how the mock services fail."""

    name: str
    script: Script
    stream: bool


def cases() -> Iterator[Case]:
    """The classifier fails from the first check on, or after it; the model fails at once, or in its stream."""
    stages: dict[str, tuple[str, int]] = {
        "classifier": ("classifier_fault", 0),
        "answer_check": ("classifier_fault", 1),
        "upstream": ("upstream_fault", 0),
    }
    for stage, (field, after) in stages.items():
        for fault in FAULTS:
            script = UNSAFE.model_copy(update={field: fault, "fault_after": after})
            yield Case(f"{stage}_{fault}", script, False)
            yield Case(f"{stage}_{fault}_stream", script, True)


async def faults(gateway: Gateway, services: MockServices, patience: float, *, quick: bool = False) -> dict[str, Any]:
    """The outcome of every case; between two the peer may recover, and ``recovered_seconds`` says how long it took."""
    found: dict[str, Any] = {}
    for case in cases():
        if quick and case.name not in QUICK:
            continue
        async with aiohttp.ClientSession() as session:
            services.follow(case.script)
            answer = await ask(session, gateway.target, patience, stream=case.stream)
            found[case.name] = {"unsafe_text_passed": MARKER.encode() in answer.raw, **describe(answer)}
            found[case.name]["recovered_seconds"] = await _recovery(session, gateway, services)
    for stream in (False, True):
        found[f"client_leaves{'_stream' if stream else ''}"] = await _leave(gateway, services, stream)
    return found


async def _recovery(session: aiohttp.ClientSession, gateway: Gateway, services: MockServices) -> float | None:
    """Seconds until a request is answered again; None when it is not."""
    script, began = Script(words=5), time.perf_counter()
    services.follow(script)
    while time.perf_counter() - began < RECOVERY_SECONDS:
        if is_good(await ask(session, gateway.target, 5.0), script):
            return round(time.perf_counter() - began, 3)
        await asyncio.sleep(0.1)
    return None


async def _leave(gateway: Gateway, services: MockServices, stream: bool) -> dict[str, Any]:
    """The client leaves in the middle of a long answer: is the generation cancelled?"""
    services.follow(Script(words=600, word_seconds=0.02))
    async with aiohttp.ClientSession() as session:
        await ask(session, gateway.target, LEAVE_AFTER, stream=stream)
    began = time.perf_counter()
    while services.counters().generations_open and time.perf_counter() - began < 3.0:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    counters = services.counters()
    cancelled = counters.generations > 0 and counters.generations_open == 0
    return {"generation_cancelled": cancelled, "seconds": round(time.perf_counter() - began, 3)}
