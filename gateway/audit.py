"""The audit log: a request is answered when its record is durable, and no record is lost in silence.

::

    record() --> waiting --> writer thread: chain, insert, commit (many records at once) --> record() returns
                                |
                                +-- the database fails: block   record() raises, the request ends with 503
                                                        degrade record() returns, the record waits in memory,
                                                                stands in the log, and is written when it can be

One thread writes, because a chain has one end. While it waits for the disk, records gather, and go into the next
transaction together: that is what makes a synced commit for each answer affordable.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prometheus_client import Counter, Gauge
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from gateway.audit_chain import AuditChain
from gateway.audit_records import AuditRecord, Prepared, prepare, prompt_hmac, read_audit_key
from services.common.logs import get_logger
from services.contracts.errors import ConfigError, UpstreamUnavailable

SERVICE = "audit"
LARGEST_BATCH = 256  # records in one transaction
RETRY_SECONDS = 1.0  # between attempts at a database that fails

RECORDS = Counter(
    "fedward_gateway_audit_records_total",
    "Audit records by what became of them: written, kept (in memory, while the database is away), refused",
    ["result"],
)
WAITING = Gauge("fedward_gateway_audit_records_waiting", "Audit records that are not written yet")
FAILING = Gauge("fedward_gateway_audit_failing", "1 while the audit database cannot be written to")


class AuditSettings(BaseModel):
    """Where the audit is kept, and what happens when it cannot be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    audit_url: SecretStr = Field(
        default=SecretStr("sqlite:///runs/audit.db"),
        description="sqlite:///file or postgresql://user:password@host/db; at first sqlite:///runs/audit.db",
    )
    audit_failure: Literal["block", "degrade"] = Field(
        default="block", description="when a record cannot be written: answer 503, or answer and keep it in memory"
    )
    audit_queue_limit: int = Field(default=10_000, ge=1, description="most records in memory; beyond it: 503")
    audit_deadline_seconds: float = Field(default=5.0, gt=0, description="longest wait for a record to be written")
    audit_key_file: Path | None = Field(
        default=None,
        description="at least 32 random bytes, the key of the prompts' hashes; without it: a new one a start",
    )
    audit_store_text: bool = Field(default=False, description="keep prompts and answers as plain text, too")
    audit_anchor_seconds: float = Field(
        default=60.0, gt=0, description="how often the chain's end is written to the log, so that cutting it off shows"
    )


class Waiting(NamedTuple):
    """A record on its way, and whom to tell."""

    prepared: Prepared
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class AuditLog:
    """Appends records to one chain of its own, under a new id for each process.

    Raises:
        ConfigError: the URL is not usable, the database cannot be opened, or the key file is no key.
    """

    def __init__(self, settings: AuditSettings) -> None:
        from gateway.audit_store import AuditStore

        self._settings = settings
        self._key = read_audit_key(settings.audit_key_file)
        self.store = AuditStore(settings.audit_url.get_secret_value())
        self._chain = AuditChain(self.store)  # the writer thread's
        self._anchored_at = time.monotonic()
        # Shared with the writer thread, under the condition's lock.
        self._wake = threading.Condition()
        self._waiting: list[Waiting] = []
        self._kept: list[Prepared] = []  # what has been promised (degrade) and is not written
        self._failing_since: float | None = None
        self._reason = ""
        self._refused = 0  # records that the gap record will count
        self._closing = False
        self._open_at_start()
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    # What the pipeline calls.

    def prompt_hash(self, prompt: str) -> str:
        """The keyed hash of a prompt, for ``AuditRecord.prompt_hmac``."""
        return prompt_hmac(self._key, prompt)

    def require(self) -> None:
        """Refuse work whose record could not be written. For the start of a request, above all of a stream.

        Raises:
            UpstreamUnavailable: the database is away and the policy is to block, or the memory for records is full.
        """
        with self._wake:
            self._require()

    async def record(self, record: AuditRecord, *, prompt: str = "", answer: str = "") -> None:
        """Append a record; returns when it is durable (or, degraded, when it is kept and logged).

        Args:
            record: what happened.
            prompt: the prompt's plain text; stored only if ``audit_store_text`` is set.
            answer: the released answer's, likewise.

        Raises:
            UpstreamUnavailable: it could not be written, so the answer must not go out.
        """
        text = {"prompt": prompt, "answer": answer} if self._settings.audit_store_text else None
        prepared = prepare(record, text)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        with self._wake:
            try:
                self._require()
            except UpstreamUnavailable:
                self._log([prepared], "audit record not written")
                raise
            if self._failing_since is not None:
                self._keep([prepared])
                return
            self._waiting.append(Waiting(prepared, loop, done))
            WAITING.set(len(self._waiting) + len(self._kept))
            self._wake.notify()
        # Shielded: a client that leaves now does not take back what has been decided.
        try:
            async with asyncio.timeout(self._settings.audit_deadline_seconds):
                await asyncio.shield(done)
        except TimeoutError as error:  # it stays in the queue, and is written in the end
            if self._settings.audit_failure == "block":
                raise UpstreamUnavailable(SERVICE, "the record was not written within the deadline") from error
            self._log([prepared], "audit record late")

    @property
    def problem(self) -> str | None:
        """Why records cannot be written at present, for the readiness answer."""
        if not self._thread.is_alive():
            return f"{SERVICE}: its writer has stopped"
        with self._wake:
            if self._failing_since is None:
                return None
            seconds = time.monotonic() - self._failing_since
            return f"{SERVICE}: not written for {seconds:.0f} s ({self._reason}); {len(self._kept)} records in memory"

    async def close(self) -> None:
        """Write what waits, log the chain's end, and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _require(self) -> None:
        if self._closing:
            raise UpstreamUnavailable(SERVICE, "the gateway is stopping")
        if self._failing_since is not None and self._settings.audit_failure == "block":
            self._refused += 1
            RECORDS.labels("refused").inc()
            raise UpstreamUnavailable(SERVICE, "records cannot be written, so nothing is answered")
        if len(self._waiting) + len(self._kept) >= self._settings.audit_queue_limit:
            RECORDS.labels("refused").inc()
            raise UpstreamUnavailable(SERVICE, "too many records wait to be written")

    # The writer thread.

    def _open_at_start(self) -> None:
        """A gateway does not start without its audit, whatever the policy: then nobody waits for it yet."""
        try:
            self.store.create()
        except Exception as error:
            raise ConfigError(
                f"the audit at {self.store.shown_url} cannot be opened: {_reason(error)}", param="audit_url"
            ) from error

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing, timeout=self._pause())
                batch, self._waiting = self._waiting[:LARGEST_BATCH], self._waiting[LARGEST_BATCH:]
                closing = self._closing and not self._waiting
            if self._failing_since is None:
                self._write_waiting(batch)
            else:
                self._write_kept()
            if closing or time.monotonic() - self._anchored_at >= self._settings.audit_anchor_seconds:
                self._anchor()
            if closing:
                self._finish()
                return

    def _pause(self) -> float:
        until_anchor = self._anchored_at + self._settings.audit_anchor_seconds - time.monotonic()
        return max(0.0, until_anchor) if self._failing_since is None else RETRY_SECONDS

    def _write_waiting(self, batch: Sequence[Waiting]) -> None:
        if not batch:
            return
        try:
            self._chain.resume(())
            self._chain.append([waiting.prepared for waiting in batch])
        except Exception as error:  # whatever it is, the thread has to live and the requests have to know
            self._failed(error, batch)
            return
        RECORDS.labels("written").inc(len(batch))
        _tell(batch, _succeed)
        with self._wake:
            WAITING.set(len(self._waiting))

    def _failed(self, error: Exception, batch: Sequence[Waiting]) -> None:
        """Change over to failing: say so in the log, and tell every request that waits, by policy."""
        self._chain.disconnect()
        with self._wake:
            self._failing_since = time.monotonic()
            self._reason = _reason(error)
            FAILING.set(1)
            batch = [*batch, *self._waiting]
            self._waiting = []
            get_logger().error(
                "the audit cannot be written",
                reason=self._reason,
                policy=self._settings.audit_failure,
                records=len(batch),
            )
            if self._settings.audit_failure == "degrade":
                self._keep([waiting.prepared for waiting in batch])
            else:
                self._log([waiting.prepared for waiting in batch], "audit record not written")
                self._refused += len(batch)
                RECORDS.labels("refused").inc(len(batch))
        _tell(batch, _succeed if self._settings.audit_failure == "degrade" else _fail)

    def _keep(self, records: Sequence[Prepared]) -> None:
        """Hold records in memory. Called with the lock held."""
        self._log(records, "audit record kept in memory")
        self._kept += records
        RECORDS.labels("kept").inc(len(records))
        WAITING.set(len(self._kept))

    def _log(self, records: Sequence[Prepared], what: str) -> None:
        """The last resort: a record that the database does not have stands in the log, without its text."""
        for prepared in records:
            get_logger().error(what, chain=self._chain.id, record=prepared.body)

    def _write_kept(self) -> None:
        """Try to write what has been kept, and a record of the gap; when that works, the audit is whole again."""
        with self._wake:
            since, refused, count = self._failing_since, self._refused, len(self._kept)
        assert since is not None
        seconds = time.monotonic() - since
        gap = AuditRecord(
            kind="gap",
            request_id=uuid.uuid4().hex,
            error=f"not written for {seconds:.1f} s ({self._reason}); {count} records kept, {refused} requests refused",
        )
        try:
            self._written(self._chain.resume(self._first_kept()))
            while batch := self._first_kept():
                self._chain.append(batch)
                self._written(len(batch))
            self._chain.append([prepare(gap)])
        except Exception as error:  # as above
            self._chain.disconnect()
            with self._wake:
                self._reason = _reason(error)
            return
        with self._wake:
            if self._kept:  # more came in the meantime: the next round takes them
                return
            self._failing_since, self._refused = None, 0
            FAILING.set(0)
            WAITING.set(0)
        get_logger().warning("the audit is written again", away_seconds=round(seconds, 1), kept=count, refused=refused)

    def _written(self, count: int) -> None:
        with self._wake:
            del self._kept[:count]
        RECORDS.labels("written").inc(count)

    def _first_kept(self) -> list[Prepared]:
        with self._wake:
            return self._kept[:LARGEST_BATCH]

    def _anchor(self) -> None:
        self._anchored_at = time.monotonic()
        self._chain.anchor()

    def _finish(self) -> None:
        with self._wake:
            lost = list(self._kept)
        if lost:
            get_logger().error("audit records not written at shutdown; the log has them", records=len(lost))
        self._chain.close()
        self.store.close()


def _tell(batch: Sequence[Waiting], what: Callable[[list[asyncio.Future[None]]], None]) -> None:
    """Wake the requests of a batch: one call into each event loop, not one for each request."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiting in batch:
        by_loop.setdefault(waiting.loop, []).append(waiting.done)
    for loop, futures in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(what, futures)


def _succeed(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _fail(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(
                UpstreamUnavailable(SERVICE, "the record could not be written, so nothing is answered")
            )
            future.exception()  # read: a request that has given up waiting is no unhandled error


def _reason(error: BaseException) -> str:
    """What went wrong, without the values: SQLAlchemy's message holds the statement with its parameters."""
    cause: Any = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).splitlines()[0][:200] if str(cause) else ''}".strip()
