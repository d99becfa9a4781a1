"""An audit log at work on a database, and what it has stored there."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gateway.audit import AuditLog, AuditSettings
from gateway.audit_records import AuditRecord, AuditRow
from gateway.audit_store import AuditStore
from gateway.audit_verify import verify


def run(url: str, work: Callable[[AuditLog], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def whole() -> Any:
        audit = AuditLog(AuditSettings.model_validate({"audit_url": url} | settings))
        try:
            return await work(audit)
        finally:
            await audit.close()

    return asyncio.run(whole())


def record(name: object, tenant: str = "acme") -> AuditRecord:
    return AuditRecord(request_id=str(name), tenant=tenant, route="/v1/chat/completions", action="allow")


def read(url: str) -> list[AuditRow]:
    store = AuditStore(url)
    try:
        return list(store.read())
    finally:
        store.close()


def stored(url: str) -> list[str]:
    """The ids of the requests in the database, in order; fails where a chain is broken."""
    rows = read(url)
    assert [report.fault for report in verify(rows) if report.fault] == []
    return [row.request_id for row in rows if '"kind":"gap"' not in row.body]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not come about")
