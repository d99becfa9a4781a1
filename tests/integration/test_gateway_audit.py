"""The audit in real databases: durable records, and what happens when the database fails, hangs or fills up."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from gateway.audit import AuditLog, AuditSettings
from gateway.audit_records import AuditRecord, AuditRow, Place
from gateway.audit_store import AuditStore
from gateway.audit_verify import main, verify
from services.contracts.errors import ConfigError, UpstreamUnavailable
from tests.fakes.postgres_server import PostgresServer


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a database that failed again at once."""
    monkeypatch.setattr("gateway.audit.RETRY_SECONDS", 0.05)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/folder/audit.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        found: str = request.getfixturevalue("sqlite_url")
        return found
    server: PostgresServer = request.getfixturevalue("postgres")
    server.sql("DROP TABLE IF EXISTS fedward_audit")
    return server.url


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


def test_records_are_stored_and_chained(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(audit: AuditLog) -> None:
        await audit.record(record("first"), prompt="a prompt", answer="an answer")
        await asyncio.gather(*(audit.record(record(i)) for i in range(600)))
        assert audit.problem is None

    run(url, work)
    ids = stored(url)
    assert len(ids) == 601
    assert {*ids} == {"first", *map(str, range(600))}
    assert main(["verify", "--url", url]) == 0
    assert "601 rows" in capsys.readouterr().out
    for row in read(url):
        assert row.text is None  # unless it is asked for
        assert "prompt" not in row.body


def test_commits_reach_the_disk(sqlite_url: str) -> None:
    """What a test cannot show by pulling the plug: SQLite is told to sync at every commit (2 is FULL)."""
    run(sqlite_url, lambda audit: audit.record(record(1)))
    store = AuditStore(sqlite_url)
    with store.connect() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
    store.close()


def test_two_replicas_have_two_chains_in_one_database(url: str) -> None:
    async def work(audit: AuditLog) -> None:
        other = AuditLog(AuditSettings.model_validate({"audit_url": url}))
        await asyncio.gather(*((audit, other)[i % 2].record(record(i)) for i in range(40)))
        await other.close()

    run(url, work)
    assert sorted(map(int, stored(url))) == list(range(40))
    assert len({row.chain for row in read(url)}) == 2


def test_rows_cannot_be_changed_by_mistake(url: str) -> None:
    run(url, lambda audit: audit.record(record(1), prompt="p"), audit_store_text=True)
    store = AuditStore(url)
    for statement in ("DELETE FROM fedward_audit", "UPDATE fedward_audit SET tenant = 'x'"):
        with store.connect() as connection, pytest.raises(DBAPIError, match="append-only"):
            connection.execute(text(statement))
    with store.connect() as connection:  # kept texts can be deleted
        connection.execute(text("UPDATE fedward_audit SET text = NULL"))
        connection.commit()
    store.close()
    assert stored(url) == ["1"]


def test_text_is_kept_only_when_asked_for(sqlite_url: str, tmp_path: Path) -> None:
    run(sqlite_url, lambda audit: audit.record(record(1), prompt="the prompt", answer="é\0"), audit_store_text=True)
    out = tmp_path / "out.jsonl"
    assert main(["export", "--url", sqlite_url, "--out", str(out), "--text"]) == 0
    line = json.loads(out.read_text())
    assert {"prompt": "the prompt", "answer": "é\0"}.items() <= line["text"].items()
    assert main(["export", "--url", sqlite_url, "--out", str(out)]) == 0
    assert "the prompt" not in out.read_text()
    assert out.stat().st_mode & 0o777 == 0o600


def test_export_by_tenant_and_time(url: str, tmp_path: Path) -> None:
    async def work(audit: AuditLog) -> None:
        await audit.record(record(1, "acme").model_copy(update={"at": "2026-01-01T00:00:00.000Z"}))
        await audit.record(record(2, "acme"))
        await audit.record(record(3, "globex"))
        assert [row.request_id for row in await asyncio.to_thread(audit.store.recent, 2)] == ["3", "2"]

    run(url, work)
    out = tmp_path / "out.jsonl"
    assert main(["export", "--url", url, "--out", str(out), "--tenant", "acme", "--since", "2026-02-01"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["2"]
    assert lines[0]["seq"] == 2


def test_rows_of_one_moment_in_two_chains_are_paged_through(url: str) -> None:
    async def work(audit: AuditLog) -> None:
        for i in (1, 2, 3):
            await audit.record(record(i, "acme").model_copy(update={"at": "2026-01-01T00:00:00.000Z"}))

    run(url, work)
    run(url, work)
    store = AuditStore(url)
    pages, before = [], None
    while page := store.recent(2, "acme", before):
        pages.append(page)
        before = Place(page[-1].at, page[-1].seq, page[-1].chain)
    store.close()
    rows = [row for page in pages for row in page]
    assert [len(page) for page in pages] == [2, 2, 2]
    assert [row.seq for row in rows] == [3, 3, 2, 2, 1, 1]
    assert len({(row.chain, row.seq) for row in rows}) == 6


def test_verify_reports_and_exit_codes(sqlite_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(audit: AuditLog) -> None:
        for i in range(5):
            await audit.record(record(i))

    with capture_logs() as logs:
        run(sqlite_url, work)
    (anchor,) = (line for line in logs if line["event"] == "audit anchor")
    log = tmp_path / "gateway.log"
    log.write_text(json.dumps(anchor))
    assert main(["verify", "--url", sqlite_url, "--log", str(log)]) == 0
    assert main(["verify", "--url", sqlite_url, "--anchor", f"{anchor['chain']}:5:{anchor['hash']}"]) == 0

    database = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    database.execute("DROP TRIGGER fedward_audit_no_delete")
    database.execute("DELETE FROM fedward_audit WHERE seq = 5")
    database.commit()
    capsys.readouterr()
    assert main(["verify", "--url", sqlite_url]) == 0  # a tail that is cut off shows only by an anchor
    assert main(["verify", "--url", sqlite_url, "--log", str(log)]) == 1
    assert "cut off: it ends at row 4" in capsys.readouterr().out
    database.execute("DELETE FROM fedward_audit WHERE seq = 2")
    database.commit()
    database.close()
    assert main(["verify", "--url", sqlite_url]) == 1
    assert "row 2 is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "url", ["sqlite:///{}/none.db", "sqlite://", "mysql://host/db", "nonsense", "postgresql://nobody@127.0.0.1:1/db"]
)
def test_what_cannot_be_read_is_exit_code_2(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--url", url.format(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        AuditLog(AuditSettings.model_validate({"audit_url": url.format("/dev/null")}))


def test_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        AuditLog(AuditSettings.model_validate({"audit_url": "postgresql://u:secret-word@127.0.0.1:1/db"}))
    assert "secret-word" not in caught.value.message
    assert "secret-word" not in repr(AuditSettings.model_validate({"audit_url": "postgresql://u:secret-word@h/db"}))


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not come about")


def test_dead_database_blocks_and_comes_back(postgres: PostgresServer) -> None:
    postgres.sql("DROP TABLE IF EXISTS fedward_audit")

    async def work(audit: AuditLog) -> None:
        await audit.record(record("before"))
        postgres.kill()
        results = await asyncio.gather(*(audit.record(record(f"lost-{i}")) for i in range(10)), return_exceptions=True)
        assert all(isinstance(result, UpstreamUnavailable) for result in results)
        with pytest.raises(UpstreamUnavailable, match="audit: records cannot be written") as caught:
            audit.require()
        assert caught.value.http_status == 503
        assert "not written for" in (audit.problem or "")
        assert REGISTRY.get_sample_value("fedward_gateway_audit_failing") == 1
        postgres.start()
        await eventually(lambda: audit.problem is None)
        await audit.record(record("after"))

    run(postgres.url, work)
    assert stored(postgres.url) == ["before", "after"]
    gaps = [json.loads(row.body) for row in read(postgres.url) if '"kind":"gap"' in row.body]
    assert len(gaps) == 1
    assert re.search(r"not written for [\d.]+ s .*; 0 records kept, 11 requests refused", gaps[0]["error"])


def test_degraded_records_are_kept_logged_and_written_later(
    postgres: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    postgres.sql("DROP TABLE IF EXISTS fedward_audit")

    async def work(audit: AuditLog) -> None:
        await audit.record(record("before"))
        postgres.kill()
        await asyncio.gather(*(audit.record(record(f"kept-{i}"), prompt="the prompt") for i in range(18)))
        await audit.record(record("kept-18"))
        assert "19 records in memory" in (audit.problem or "")
        await audit.record(record("kept-19"))
        with pytest.raises(UpstreamUnavailable, match="too many records wait"):  # the memory is bounded
            await audit.record(record("refused"))
        postgres.start()
        await eventually(lambda: audit.problem is None)
        await audit.record(record("after"))

    run(postgres.url, work, audit_failure="degrade", audit_queue_limit=20)
    ids = stored(postgres.url)
    assert ids[0] == "before"
    assert ids[-1] == "after"
    assert {*ids[1:-1]} == {f"kept-{i}" for i in range(20)}
    assert len(ids) == 22
    shown = capsys.readouterr().out
    assert all(f"kept-{i}" in shown for i in range(20))
    assert "the prompt" not in shown


def test_commit_whose_answer_was_lost_is_not_written_twice(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case of a broken connection: the transaction was made, and we are told that it was not."""
    from gateway import audit_store

    real, fail = audit_store.append, [True]

    def append(connection: Any, rows: Any) -> None:
        real(connection, rows)
        if fail and fail.pop():
            raise ConnectionError("the connection broke after the commit")

    monkeypatch.setattr(audit_store, "append", append)

    async def work(audit: AuditLog) -> None:
        await asyncio.gather(*(audit.record(record(i)) for i in range(5)))
        await eventually(lambda: audit.problem is None)
        fail.append(True)
        await audit.record(record(5))
        await asyncio.gather(*(audit.record(record(i)) for i in range(6, 9)))
        await eventually(lambda: audit.problem is None)

    run(sqlite_url, work, audit_failure="degrade")
    assert sorted(stored(sqlite_url)) == [str(i) for i in range(9)]


def test_gap_record_that_was_written_does_not_swallow_a_kept_one(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway import audit_store

    real, attempts = audit_store.append, [0]

    def append(connection: Any, rows: Any) -> None:
        attempts[0] += 1
        if attempts[0] == 1:
            raise ConnectionError("not written")
        real(connection, rows)
        if '"kind":"gap"' in rows[0].body and attempts[0] == 3:
            loop.call_soon_threadsafe(late.set)
            raise ConnectionError("the answer about the gap record was lost")

    late, loop = asyncio.Event(), asyncio.new_event_loop()
    monkeypatch.setattr(audit_store, "append", append)

    async def work() -> None:
        audit = AuditLog(AuditSettings.model_validate({"audit_url": sqlite_url, "audit_failure": "degrade"}))
        await audit.record(record("first"))
        await late.wait()
        await audit.record(record("second"))
        await eventually(lambda: audit.problem is None)
        await audit.close()

    loop.run_until_complete(work())
    loop.close()
    assert stored(sqlite_url) == ["first", "second"]


FULL_DISK = """
import asyncio, resource, sys
import gateway.audit
gateway.audit.RETRY_SECONDS = 0.05
from gateway.audit import AuditLog, AuditSettings
from gateway.audit_records import AuditRecord
from services.contracts.errors import UpstreamUnavailable

async def main():
    audit = AuditLog(AuditSettings.model_validate({"audit_url": sys.argv[1], "audit_failure": sys.argv[2]}))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    await audit.record(AuditRecord(request_id="before"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # a write beyond it fails, as on a full disk
    outcomes = []
    for i in range(3):
        try:
            await audit.record(AuditRecord(request_id=f"full-{i}"))
            outcomes.append("ok")
        except UpstreamUnavailable:
            outcomes.append("503")
    assert audit.problem, "it has to show in the readiness"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    while audit.problem:
        await asyncio.sleep(0.02)
    await audit.record(AuditRecord(request_id="after"))
    await audit.close()
    print(",".join(outcomes), file=sys.stderr)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("policy", "outcome", "ids"),
    [
        ("block", "503,503,503", ["before", "after"]),
        ("degrade", "ok,ok,ok", ["before", "full-0", "full-1", "full-2", "after"]),
    ],
)
def test_file_that_cannot_grow(sqlite_url: str, policy: str, outcome: str, ids: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, sqlite_url, policy], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == outcome
    assert stored(sqlite_url) == ids


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here: the full disk is tested by the file size limit only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("policy", ["block", "degrade"])
def test_full_disk(small_disk: Path, policy: str) -> None:
    url = f"sqlite:///{small_disk}/audit.db"
    answered: list[str] = []

    async def work(audit: AuditLog) -> None:
        await audit.record(record("first"))
        answered.append("first")
        ballast = small_disk / "ballast"
        await asyncio.to_thread(fill, ballast)
        for i in range(200):
            big = record(i).model_copy(update={"error": "x" * 200})
            try:
                await audit.record(big)
                answered.append(str(i))
            except UpstreamUnavailable:
                break
            if policy == "degrade" and audit.problem:
                break
        assert audit.problem is not None
        assert "full" in audit.problem
        await asyncio.to_thread(ballast.unlink)
        await eventually(lambda: audit.problem is None)
        await audit.record(record("last"))
        answered.append("last")

    run(url, work, audit_failure=policy)
    assert stored(url) == answered


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


KILLED = """
import asyncio, os, sys
from gateway.audit import AuditLog, AuditSettings
from gateway.audit_records import AuditRecord

async def one(audit, worker):
    for i in range(100_000):
        name = f"{worker}-{i}"
        await audit.record(AuditRecord(request_id=name))
        os.write(1, f"{name}\\n".encode())

async def main():
    audit = AuditLog(AuditSettings.model_validate({"audit_url": sys.argv[1]}))
    await asyncio.gather(*(one(audit, worker) for worker in range(16)))

asyncio.run(main())
"""


def test_killed_process_loses_no_record_of_an_answered_request(url: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE)
    assert process.stdout is not None
    answered = [process.stdout.readline().decode().strip() for _ in range(300)]
    os.kill(process.pid, signal.SIGKILL)
    answered += [line.decode().strip() for line in process.stdout.readlines() if line.endswith(b"\n")]
    process.wait(timeout=10)
    process.stdout.close()
    ids = {*stored(url)}
    assert {*answered} <= ids
    assert len(ids) - len(answered) <= 16  # one for each request that was under way


def test_client_that_leaves_does_not_take_its_record_back(sqlite_url: str) -> None:
    async def work(audit: AuditLog) -> None:
        task = asyncio.create_task(audit.record(record("left")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await audit.record(record("stayed"))

    run(sqlite_url, work)
    assert sorted(stored(sqlite_url)) == ["left", "stayed"]


def test_locked_database_is_waited_for_no_longer_than_the_deadline(sqlite_url: str) -> None:
    async def work(audit: AuditLog) -> None:
        await audit.record(record("before"))
        other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UpstreamUnavailable, match="within the deadline"):
            await audit.record(record("late"))
        other.rollback()
        other.close()
        await audit.record(record("after"))

    run(sqlite_url, work, audit_deadline_seconds=1.5)
    # "late" may be written although its request was refused: too much is recorded rather than too little.
    assert stored(sqlite_url) == ["before", "late", "after"]
