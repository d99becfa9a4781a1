"""The audit in real databases: what is stored, exported and verified."""

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from gateway.audit import AuditLog, AuditSettings
from gateway.audit_records import Place
from gateway.audit_store import AuditStore
from gateway.audit_verify import main
from services.contracts.errors import ConfigError
from tests.fakes.audit_logs import read, record, run, stored


def test_records_are_stored_and_chained(audit_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(audit: AuditLog) -> None:
        await audit.record(record("first"), prompt="a prompt", answer="an answer")
        await asyncio.gather(*(audit.record(record(i)) for i in range(600)))
        assert audit.problem is None

    run(audit_url, work)
    ids = stored(audit_url)
    assert len(ids) == 601
    assert {*ids} == {"first", *map(str, range(600))}
    assert main(["verify", "--url", audit_url]) == 0
    assert "601 rows" in capsys.readouterr().out
    for row in read(audit_url):
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


def test_two_replicas_have_two_chains_in_one_database(audit_url: str) -> None:
    async def work(audit: AuditLog) -> None:
        other = AuditLog(AuditSettings.model_validate({"audit_url": audit_url}))
        await asyncio.gather(*((audit, other)[i % 2].record(record(i)) for i in range(40)))
        await other.close()

    run(audit_url, work)
    assert sorted(map(int, stored(audit_url))) == list(range(40))
    assert len({row.chain for row in read(audit_url)}) == 2


def test_rows_cannot_be_changed_by_mistake(audit_url: str) -> None:
    run(audit_url, lambda audit: audit.record(record(1), prompt="p"), audit_store_text=True)
    store = AuditStore(audit_url)
    for statement in ("DELETE FROM fedward_audit", "UPDATE fedward_audit SET tenant = 'x'"):
        with store.connect() as connection, pytest.raises(DBAPIError, match="append-only"):
            connection.execute(text(statement))
    with store.connect() as connection:  # kept texts can be deleted
        connection.execute(text("UPDATE fedward_audit SET text = NULL"))
        connection.commit()
    store.close()
    assert stored(audit_url) == ["1"]


def test_text_is_kept_only_when_asked_for(sqlite_url: str, tmp_path: Path) -> None:
    run(sqlite_url, lambda audit: audit.record(record(1), prompt="the prompt", answer="é\0"), audit_store_text=True)
    out = tmp_path / "out.jsonl"
    assert main(["export", "--url", sqlite_url, "--out", str(out), "--text"]) == 0
    line = json.loads(out.read_text())
    assert {"prompt": "the prompt", "answer": "é\0"}.items() <= line["text"].items()
    assert main(["export", "--url", sqlite_url, "--out", str(out)]) == 0
    assert "the prompt" not in out.read_text()
    assert out.stat().st_mode & 0o777 == 0o600


def test_export_by_tenant_and_time(audit_url: str, tmp_path: Path) -> None:
    async def work(audit: AuditLog) -> None:
        await audit.record(record(1, "acme").model_copy(update={"at": "2026-01-01T00:00:00.000Z"}))
        await audit.record(record(2, "acme"))
        await audit.record(record(3, "globex"))
        assert [row.request_id for row in await asyncio.to_thread(audit.store.recent, 2)] == ["3", "2"]

    run(audit_url, work)
    out = tmp_path / "out.jsonl"
    assert main(["export", "--url", audit_url, "--out", str(out), "--tenant", "acme", "--since", "2026-02-01"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["2"]
    assert lines[0]["seq"] == 2


def test_rows_of_one_moment_in_two_chains_are_paged_through(audit_url: str) -> None:
    async def work(audit: AuditLog) -> None:
        for i in (1, 2, 3):
            await audit.record(record(i, "acme").model_copy(update={"at": "2026-01-01T00:00:00.000Z"}))

    run(audit_url, work)
    run(audit_url, work)
    store = AuditStore(audit_url)
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
