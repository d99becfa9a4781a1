"""The audit's table in SQLite or PostgreSQL, by SQLAlchemy Core. Its rows can be added and read, not changed.

Imported only when an audit is kept, and the database's driver only when its URL names it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    MetaData,
    Select,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
    tuple_,
)
from sqlalchemy.exc import ArgumentError

from gateway.audit_records import FIRST, AuditRow, Place
from services.contracts.errors import ConfigError

CONNECT_SECONDS = 2
WRITE_SECONDS = 5  # longest wait for another writer of the same SQLite file, or for PostgreSQL's answer
POSTGRES_TIMEOUTS: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "tcp_user_timeout": WRITE_SECONDS * 1000,  # without it a server that vanishes is noticed after many minutes
    "options": f"-c statement_timeout={WRITE_SECONDS * 1000}",
}

TABLE = Table(
    "fedward_audit",
    MetaData(),
    Column("chain", String(32), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", String(24), nullable=False),
    Column("tenant", String(256), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("body", Text, nullable=False),
    Column("text", Text),
    Column("hash", String(64), nullable=False),
    Index("fedward_audit_at", "at"),
    Index("fedward_audit_tenant_at", "tenant", "at"),
)
# A guard against mistakes; whoever may drop a trigger can still rewrite rows, which is what the chain is for.
# The column "text" may be emptied: that is how kept texts are deleted.
SQLITE_GUARDS = (
    "CREATE TRIGGER IF NOT EXISTS fedward_audit_no_delete BEFORE DELETE ON fedward_audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS fedward_audit_no_update "
    "BEFORE UPDATE OF chain, seq, at, tenant, request_id, body, hash ON fedward_audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END",
)
POSTGRES_GUARDS = (
    "CREATE OR REPLACE FUNCTION fedward_audit_guard() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the audit is append-only'; END $$",
    "CREATE OR REPLACE TRIGGER fedward_audit_no_delete BEFORE DELETE ON fedward_audit "
    "FOR EACH ROW EXECUTE FUNCTION fedward_audit_guard()",
    "CREATE OR REPLACE TRIGGER fedward_audit_no_update "
    "BEFORE UPDATE OF chain, seq, at, tenant, request_id, body, hash ON fedward_audit "
    "FOR EACH ROW EXECUTE FUNCTION fedward_audit_guard()",
)
SCHEMA_LOCK = 0x66656477  # PostgreSQL: replicas that start at once make the table one after the other


class Head(NamedTuple):
    """Where a chain ends."""

    seq: int
    hash: str


class AuditStore:
    """The table behind a database URL.

    Raises:
        ConfigError: the URL is no ``sqlite:///`` or ``postgresql://`` one, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse(url)
        self.shown_url = parsed.render_as_string(hide_password=True)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        arguments = {"timeout": WRITE_SECONDS} if self._sqlite else POSTGRES_TIMEOUTS
        try:
            self._engine: Engine = create_engine(parsed, connect_args=arguments)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.shown_url} needs {error.name}; install fedward[postgres]") from error
        if self._sqlite:
            event.listen(self._engine, "connect", _set_up_sqlite)

    def create(self) -> None:
        """Make the table with its guards where there is none; raises SQLAlchemyError or OSError.

        Where the table is there, nothing but INSERT and SELECT is asked of the database.
        """
        if self._sqlite and self._engine.url.database:
            Path(self._engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        with self._engine.begin() as connection:
            if not self._sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            if inspect(connection).has_table(TABLE.name):
                return
            TABLE.metadata.create_all(connection)
            for statement in SQLITE_GUARDS if self._sqlite else POSTGRES_GUARDS:
                connection.execute(text(statement))

    def connect(self) -> Connection:
        """A connection to append by; raises SQLAlchemyError."""
        return self._engine.connect()

    def read(
        self, *, since: str | None = None, tenant: str | None = None, chain: str | None = None
    ) -> Iterator[AuditRow]:
        """Rows in the order of their chains, a few at a time; raises SQLAlchemyError."""
        query = select(TABLE).order_by(TABLE.c.chain, TABLE.c.seq)
        if since is not None:
            query = query.where(TABLE.c.at >= since)
        if tenant is not None:
            query = query.where(TABLE.c.tenant == tenant)
        if chain is not None:
            query = query.where(TABLE.c.chain == chain)
        yield from self._rows(query)

    def recent(self, limit: int, tenant: str | None = None, before: Place | None = None) -> list[AuditRow]:
        """The latest rows, or the latest ``before`` a row; the latest first. Raises SQLAlchemyError."""
        place = (TABLE.c.at, TABLE.c.seq, TABLE.c.chain)
        query = select(TABLE).order_by(*(column.desc() for column in place)).limit(limit)
        if tenant is not None:
            query = query.where(TABLE.c.tenant == tenant)
        if before is not None:
            query = query.where(tuple_(*place) < tuple_(*before))
        return list(self._rows(query))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _rows(self, query: Select[Any]) -> Iterator[AuditRow]:
        with self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=500).execute(query):
                yield AuditRow(*row)


def head(connection: Connection, chain: str) -> Head:
    """Where a chain ends in the database; raises SQLAlchemyError."""
    query = select(TABLE.c.seq, TABLE.c.hash).where(TABLE.c.chain == chain).order_by(TABLE.c.seq.desc()).limit(1)
    row = connection.execute(query).first()
    connection.rollback()  # ends the transaction that the query began
    return Head(row.seq, row.hash) if row else Head(0, FIRST)


def append(connection: Connection, rows: Sequence[AuditRow]) -> None:
    """Add rows in one transaction: all of them are durable afterwards, or none is there. Raises SQLAlchemyError."""
    connection.execute(TABLE.insert(), [row._asdict() for row in rows])
    connection.commit()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the audit URL cannot be read; write sqlite:///file or postgresql://host/database") from error
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise ConfigError(
        f"{parsed.render_as_string(hide_password=True)}: the audit goes to sqlite:///file or postgresql://host/database"
    )


def _set_up_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers (the console, verify) do not stop the writer
    # FULL syncs the log at every commit. NORMAL would keep a commit through a crash of the process, but not through
    # one of the machine, and an answer only goes out when its record is durable. Commits are shared by many requests.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA cache_size=-256")  # KiB; rows are added at the end and few are read
    cursor.close()
