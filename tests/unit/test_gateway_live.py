"""Watching a request while it is at work: only one's own, in order, to its end, and with a bound on how many."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from gateway import live
from gateway.auth import Identity
from gateway.live import LiveVisits
from gateway.policy import Action, Decision, Direction, Policy
from gateway.policy_file import Route
from gateway.visits import Visit


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.001)


def visit(tenant: str = "a", request_id: str = "1") -> Visit:
    return Visit(request_id, Identity(tenant), Route.CHAT, Policy())


def decided(action: Action) -> Decision:
    return Decision(action, Direction.RESPONSE, ("S1",))


async def drain(events: AsyncGenerator[Any, None]) -> list[Any]:
    return [event async for event in events]


def test_watcher_sees_every_decision_once_and_the_end() -> None:
    async def story() -> None:
        visits, mine = LiveVisits(), visit()
        events = visits.watch("a", "1")
        assert (await anext(events))["state"] == "waiting"
        mine.held = {0: 30, 1: 10}
        with visits.at_work(mine):
            mine.note(decided(Action.ALLOW), [], 20, 0.01)
            first = await anext(events)
            mine.released.append("twenty characters...")
            mine.note(decided(Action.REFUSE), [], 20, 0.01)
            second = await anext(events)
        last = await drain(events)
        assert [decision["action"] for decision in first["decisions"]] == ["allow"]
        assert (first["held"], first["released"]) == (40, 0)
        assert [decision["action"] for decision in second["decisions"]] == ["refuse"]
        assert second["released"] == 20
        assert last == [{"state": "over", "held": 0, "released": 20, "decisions": []}]

    asyncio.run(story())


def test_decision_just_before_the_end_is_told_with_it() -> None:
    async def story() -> None:
        visits, mine = LiveVisits(), visit()
        events = visits.watch("a", "1")
        await anext(events)
        with visits.at_work(mine):
            mine.note(decided(Action.REFUSE), [], 20, 0.01)
        (last,) = await drain(events)
        assert (last["state"], len(last["decisions"])) == ("over", 1)

    asyncio.run(story())


@pytest.mark.parametrize(("tenant", "request_id"), [("b", "1"), ("a", "2")])
def test_nothing_is_seen_of_another_tenant_or_another_request(
    monkeypatch: pytest.MonkeyPatch, tenant: str, request_id: str
) -> None:
    monkeypatch.setattr(live, "LOOKS_WITHOUT_VISIT", 3)

    async def story() -> None:
        visits, other = LiveVisits(), visit(tenant, request_id)
        events = visits.watch("a", "1")
        await anext(events)
        with visits.at_work(other):
            other.note(decided(Action.REFUSE), [], 20, 0.01)
            assert await drain(events) == [{"state": "over", "held": 0, "released": 0, "decisions": []}]

    asyncio.run(story())


def test_watchers_are_bounded_and_one_request_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_WATCHED", 2)

    async def story() -> None:
        visits = LiveVisits()
        first = visits.watch("a", "1")
        assert (await anext(first))["state"] == "waiting"
        assert [event["state"] for event in await drain(visits.watch("a", "1"))] == ["over"]
        second = visits.watch("a", "2")
        await anext(second)
        assert [event["state"] for event in await drain(visits.watch("a", "3"))] == ["over"]
        others = visits.watch("b", "3")
        assert (await anext(others))["state"] == "waiting"
        await others.aclose()
        await second.aclose()
        third = visits.watch("a", "3")
        assert (await anext(third))["state"] == "waiting"
        await third.aclose()
        await first.aclose()

    asyncio.run(story())
