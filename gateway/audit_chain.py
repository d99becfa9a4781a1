"""One chain of the audit and the connection it is written by: where it ends, and how it goes on after a failure."""

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import Histogram

from gateway.audit_records import FIRST, Prepared, chain_rows
from services.common.logs import get_logger

if TYPE_CHECKING:  # SQLAlchemy costs 11 MB, which a process without an audit does without
    from sqlalchemy import Connection

    from gateway.audit_store import AuditStore

COMMIT_SECONDS = Histogram(
    "fedward_gateway_audit_commit_seconds",
    "Time of one transaction of the audit",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0),
)


class AuditChain:
    """A chain of its own for each process, under a new id, so that replicas write to one database side by side.

    Used by one thread only: a chain has one end.
    """

    def __init__(self, store: "AuditStore") -> None:
        self.id = uuid.uuid4().hex
        self._store = store
        self._connection: Connection | None = None
        self._seq, self._hash = 0, FIRST
        self._anchored_seq = 0

    def resume(self, unsure: Sequence[Prepared]) -> int:
        """Connect where there is no connection, and take the chain's end from the database.

        Args:
            unsure: the records that are to be written next, among them those of a commit that failed. It may have
                been made all the same, when only the answer to it was lost.

        Returns:
            How many of ``unsure``, from the first on, turn out to be written.
        """
        from gateway.audit_store import head

        if self._connection is not None:
            return 0
        self._connection = self._store.connect()
        seq, last = head(self._connection, self.id)
        rows = chain_rows(self.id, self._seq, self._hash, unsure[: seq - self._seq])
        self._seq, self._hash = seq, last
        return len(rows) if rows and rows[-1].hash == last else 0

    def append(self, records: Sequence[Prepared]) -> None:
        """Write records in one transaction, and move the chain's end only after it. Call ``resume`` before."""
        from gateway.audit_store import append

        assert self._connection is not None
        started = time.perf_counter()
        rows = chain_rows(self.id, self._seq, self._hash, records)
        append(self._connection, rows)
        self._seq, self._hash = rows[-1].seq, rows[-1].hash
        COMMIT_SECONDS.observe(time.perf_counter() - started)

    def disconnect(self) -> None:
        """Throw the connection away after a failure; what it was in the middle of is undone by the database."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception as error:  # it is broken; what is wrong with it has been logged
                get_logger().debug("audit connection not closed", reason=type(error).__name__)

    def anchor(self) -> None:
        """Write the chain's end to the log, outside of the database's reach, if it has moved."""
        if self._seq > self._anchored_seq:
            self._anchored_seq = self._seq
            get_logger().info("audit anchor", chain=self.id, seq=self._seq, hash=self._hash)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
