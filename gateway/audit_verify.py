"""``python -m gateway audit verify|export``: is the audit as it was written; and its rows as JSON lines."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from gateway.audit_records import FIRST, AuditRow, row_hash, text_hash
from gateway.audit_store import AuditStore
from services.common.settings import exit_with
from services.contracts.errors import ConfigError, FedwardError

URL_VARIABLE = "FEDWARD_GATEWAY_AUDIT_URL"
BROKEN = 1


class Anchor(NamedTuple):
    """A chain's end as it was once written to the log: row ``seq`` had this hash."""

    chain: str
    seq: int
    hash: str


class ChainReport(NamedTuple):
    """What was found of one chain; ``fault`` is the first thing that is wrong with it."""

    chain: str
    rows: int
    texts_deleted: int
    fault: str | None


def verify(rows: Iterable[AuditRow], anchors: Sequence[Anchor] = ()) -> list[ChainReport]:
    """Walk all chains.

    Args:
        rows: of all chains, in the order of chain and number.
        anchors: what must be there; without one, rows cut off from a chain's end do not show.
    """
    wanted: dict[str, dict[int, str]] = {}
    for anchor in anchors:
        wanted.setdefault(anchor.chain, {})[anchor.seq] = anchor.hash
    reports = []
    for chain, chain_rows in groupby(rows, key=attrgetter("chain")):
        reports.append(_verify_chain(chain, chain_rows, wanted.pop(chain, {})))
    for chain, missing in wanted.items():
        reports.append(ChainReport(chain, 0, 0, f"the whole chain is gone; row {max(missing)} was anchored"))
    return reports


def _verify_chain(chain: str, rows: Iterable[AuditRow], anchored: dict[int, str]) -> ChainReport:
    count, deleted, previous = 0, 0, FIRST
    for row in rows:
        fault = _fault(row, count + 1, previous, anchored.get(count + 1))
        if fault is not None:
            return ChainReport(chain, count, deleted, fault)
        count, previous = count + 1, row.hash
        deleted += row.text is None and "text_sha256" in json.loads(row.body)
    last = max(anchored, default=0)
    fault = f"cut off: it ends at row {count}, and row {last} was anchored" if last > count else None
    return ChainReport(chain, count, deleted, fault)


def _fault(row: AuditRow, seq: int, previous: str, anchored: str | None) -> str | None:
    """What is wrong with a row that should be number ``seq`` after a row of hash ``previous``."""
    if row.seq != seq:
        return f"row {seq} is missing: after row {seq - 1} comes row {row.seq}"
    if row.hash != row_hash(previous, row.chain, seq, row.body):
        return f"row {seq} is not what was written there: its hash does not follow from it and the row before"
    if anchored is not None and anchored != row.hash:
        return f"row {seq} was rewritten together with its hash: its anchor is another"
    try:
        return _fault_inside(row, json.loads(row.body))
    except (ValueError, KeyError, TypeError, AttributeError):  # who writes rows need not write ours
        return f"row {seq} is no record of a gateway, although its hash is right"


def _fault_inside(row: AuditRow, body: dict[str, str]) -> str | None:
    """What does not agree between a record and the columns beside it, which the hash does not cover."""
    for name in ("at", "tenant", "request_id"):
        if getattr(row, name) != body[name]:
            return f"row {row.seq}: the column {name} is not what the record says"
    kept = body.get("text_sha256")
    if row.text is not None and (kept is None or text_hash(row.text) != kept):
        return f"row {row.seq}: the text is not the one that was kept"
    return None


def parse_anchor(text: str) -> Anchor:
    """``chain:seq:hash``; raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9a-f]{32}):([1-9][0-9]{0,17}):([0-9a-f]{64})", text)
    if found is None:
        raise argparse.ArgumentTypeError("write an anchor as chain:seq:hash, as the log has them")
    return Anchor(found[1], int(found[2]), found[3])


def logged_anchors(path: Path) -> Iterator[Anchor]:
    """The anchors in a gateway's log; lines of any other kind are passed over. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if '"audit anchor"' in line:
                    values = json.loads(line)
                    yield Anchor(values["chain"], int(values["seq"]), values["hash"])
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the log: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: a line about an audit anchor cannot be read") from error


def export(rows: Iterable[AuditRow], out: Path, *, with_text: bool) -> int:
    """Write rows as JSON lines, each with its chain, number and hash; returns how many. Raises OSError."""
    partial = out.with_name(f".{out.name}.part")
    count = 0
    try:
        # As replace_file, but line by line: an audit need not fit into memory. For its owner's eyes only.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for row in rows:
                line = {"chain": row.chain, "seq": row.seq, "hash": row.hash, **json.loads(row.body)}
                if with_text and row.text is not None:
                    line["text"] = json.loads(row.text)
                file.write(json.dumps(line) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def main(argv: Sequence[str]) -> int:
    """``python -m gateway audit verify|export``: 0 whole, 1 broken, 2 the audit cannot be read."""
    arguments = _parser().parse_args(argv)
    try:
        with closing(_open(arguments.url)) as store:
            return (_verify if arguments.command == "verify" else _export)(store, arguments)
    except FedwardError as error:
        return exit_with(error)
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        return exit_with(ConfigError(f"the audit cannot be read: {cause}"))
    except OSError as error:
        return exit_with(ConfigError(f"{error.filename}: {error.strerror}"))


def _verify(store: AuditStore, arguments: argparse.Namespace) -> int:
    anchors = [*arguments.anchor, *(anchor for log in arguments.log for anchor in logged_anchors(log))]
    reports = verify(store.read(), anchors)
    for report in reports:
        deleted = f", {report.texts_deleted} texts deleted" if report.texts_deleted else ""
        print(f"chain {report.chain}: {report.rows} rows{deleted}: {report.fault or 'whole'}")
    broken = [report for report in reports if report.fault]
    rows = sum(report.rows for report in reports)
    print(
        f"{len(reports)} chains, {rows} rows, {len(anchors)} anchors: {f'{len(broken)} BROKEN' if broken else 'whole'}"
    )
    return BROKEN if broken else 0


def _export(store: AuditStore, arguments: argparse.Namespace) -> int:
    rows = store.read(since=arguments.since, tenant=arguments.tenant)
    print(f"{export(rows, arguments.out, with_text=arguments.text)} rows written to {arguments.out}", file=sys.stderr)
    return 0


def _open(url: str) -> AuditStore:
    """The store behind a URL; reading must not make an empty database where there was none."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the audit URL cannot be read; write sqlite:///file or postgresql://host/database") from error
    if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).is_file():
        raise ConfigError(f"{parsed.database}: there is no such audit; give --url or set {URL_VARIABLE}")
    return AuditStore(url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gateway audit",
        description="Check the gateway's audit, or write it out.",
        epilog="example: python -m gateway audit verify --url sqlite:///runs/audit.db --log gateway.log",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("verify", help="walk all chains; exit code 0 whole, 1 broken, 2 cannot be read")
    checking.add_argument("--anchor", type=parse_anchor, action="append", default=[], help="chain:seq:hash")
    checking.add_argument("--log", type=Path, action="append", default=[], help="a gateway's log: all anchors in it")
    writing = commands.add_parser("export", help="write records as JSON lines")
    writing.add_argument("--since", type=_time, help="records from this date or time on, UTC")
    writing.add_argument("--tenant", help="records of this tenant only")
    writing.add_argument("--out", type=Path, required=True, help="the file to write")
    writing.add_argument("--text", action="store_true", help="with the plain texts, where they were kept")
    for command in (checking, writing):
        default = os.environ.get(URL_VARIABLE, "sqlite:///runs/audit.db")
        command.add_argument("--url", default=default, help=f"the audit's database; default: ${URL_VARIABLE}")
    return parser


def _time(text: str) -> str:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("write a date or time as 2026-11-21 or 2026-11-21T09:30:00") from error
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
