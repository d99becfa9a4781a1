"""The chain: any single change, deletion, insertion or exchange of rows is found, and so is a tail that is cut off."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit_records import (
    FIRST,
    AuditRecord,
    AuditRow,
    DecisionEntry,
    chain_rows,
    prepare,
    prompt_hmac,
    read_audit_key,
    row_hash,
)
from gateway.audit_verify import Anchor, logged_anchors, verify
from services.contracts.errors import ConfigError
from services.contracts.verdicts import Outcome, Verdict

CHAIN = "a" * 32
KEY = b"k" * 32


def rows(count: int, chain: str = CHAIN, *, text: bool = True) -> list[AuditRow]:
    records = [
        prepare(
            AuditRecord(request_id=f"request-{i}", tenant=f"tenant-{i % 2}", released_characters=i),
            {"prompt": f"prompt {i}", "answer": "ünï\x00"} if text else None,
        )
        for i in range(count)
    ]
    return chain_rows(chain, 0, FIRST, records)


def faults(found: list[AuditRow], *anchors: Anchor) -> list[str]:
    return [report.fault for report in verify(found, anchors) if report.fault]


def end(chain: list[AuditRow]) -> Anchor:
    return Anchor(chain[-1].chain, chain[-1].seq, chain[-1].hash)


def test_untouched_chains_are_whole() -> None:
    whole = [*rows(5), *rows(3, "b" * 32)]
    assert [(report.rows, report.fault) for report in verify(whole)] == [(5, None), (3, None)]
    assert faults(whole, end(whole), end(whole[:5])) == []
    assert verify([]) == []


def test_a_chain_written_in_parts_is_the_same() -> None:
    records = [prepare(AuditRecord(request_id=str(i), at="2026-01-01T00:00:00.000Z")) for i in range(7)]
    first = chain_rows(CHAIN, 0, FIRST, records[:3])
    assert first + chain_rows(CHAIN, 3, first[-1].hash, records[3:]) == chain_rows(CHAIN, 0, FIRST, records)


def change(field: str, value: Any) -> Callable[[AuditRow], AuditRow]:
    return lambda row: row._replace(**{field: value})


CHANGES = st.one_of(
    st.builds(change, st.just("at"), st.just("2020-01-01T00:00:00.000Z")),
    st.builds(change, st.sampled_from(["tenant", "request_id", "body", "text", "hash"]), st.text(max_size=40)),
    st.builds(change, st.just("seq"), st.integers(-2, 99)),
    st.just(lambda row: row._replace(body=row.body.replace('"released_characters":', '"released_characters":1'))),
    st.just(lambda row: row._replace(text=row.text and row.text.replace("prompt", "Prompt", 1))),
)


@given(st.integers(1, 12), st.data(), CHANGES)
def test_any_changed_row_is_found(count: int, data: st.DataObject, edit: Callable[[AuditRow], AuditRow]) -> None:
    chain = rows(count)
    place = data.draw(st.integers(0, count - 1))
    changed = edit(chain[place])
    if changed == chain[place]:
        return
    after = sorted(
        [*chain[:place], changed, *chain[place + 1 :]], key=lambda row: row.seq
    )  # as the database gives them
    assert len(faults(after)) == 1


@given(st.integers(2, 12), st.data())
def test_any_deleted_row_is_found(count: int, data: st.DataObject) -> None:
    chain = rows(count)
    place = data.draw(st.integers(0, count - 2))
    assert faults(chain[:place] + chain[place + 1 :]) == [
        f"row {place + 1} is missing: after row {place} comes row {place + 2}"
    ]


@given(st.integers(2, 12), st.data())
def test_closing_the_gap_of_a_deleted_row_is_found(count: int, data: st.DataObject) -> None:
    chain = rows(count)
    place = data.draw(st.integers(0, count - 2))
    renumbered = [row._replace(seq=row.seq - 1) for row in chain[place + 1 :]]
    assert len(faults(chain[:place] + renumbered)) == 1


@given(st.integers(2, 12), st.data())
def test_any_two_exchanged_rows_are_found(count: int, data: st.DataObject) -> None:
    chain = rows(count)
    i, j = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    chain[i], chain[j] = chain[j]._replace(seq=chain[i].seq), chain[i]._replace(seq=chain[j].seq)
    assert len(faults(chain)) == 1


@given(st.integers(1, 12), st.data())
def test_an_inserted_row_is_found(count: int, data: st.DataObject) -> None:
    chain = rows(count)
    place = data.draw(st.integers(0, count - 1))
    forged = rows(place + 1, text=False)[place]
    later = [row._replace(seq=row.seq + 1) for row in chain[place:]]
    assert len(faults([*chain[:place], forged, *later])) == 1


@given(st.integers(2, 12), st.data())
def test_a_tail_that_is_cut_off_shows_by_its_anchor(count: int, data: st.DataObject) -> None:
    chain = rows(count)
    kept = data.draw(st.integers(1, count - 1))
    assert faults(chain[:kept]) == []  # the reason for anchors
    assert faults(chain[:kept], end(chain)) == [f"cut off: it ends at row {kept}, and row {count} was anchored"]


def test_a_whole_chain_that_is_gone_or_forged_shows_by_its_anchor() -> None:
    chain = rows(4)
    assert faults([], end(chain)) == ["the whole chain is gone; row 4 was anchored"]
    forged = rows(4, text=False)
    assert faults(forged) == []  # who can compute the hashes can make another whole chain
    assert "its anchor is another" in faults(forged, end(chain))[0]


def test_deleted_texts_leave_the_chain_whole() -> None:
    emptied = [row._replace(text=None) for row in rows(3)]
    (report,) = verify(emptied)
    assert (report.rows, report.texts_deleted, report.fault) == (3, 3, None)


def test_added_text_is_found() -> None:
    chain = rows(2, text=False)
    assert faults([chain[0]._replace(text="{}"), chain[1]]) == ["row 1: the text is not the one that was kept"]


@pytest.mark.parametrize("body", ["", "[]", "7", "{}", '{"at": 1}', "null"])
def test_a_row_that_is_no_record_is_a_fault_and_no_crash(body: str) -> None:
    row = AuditRow(CHAIN, 1, "", "", "", body, None, row_hash(FIRST, CHAIN, 1, body))
    assert len(faults([row])) == 1


@given(st.text(), st.text())
def test_any_text_can_be_recorded(prompt: str, model: str) -> None:
    prepared = prepare(AuditRecord(request_id="r", model=model), {"prompt": prompt, "answer": "\ud800"})
    body = json.loads(prepared.body)
    assert prepared.body.isascii()
    assert "\0" not in body["model"]
    assert json.loads(prepared.text or "")["prompt"] == prompt
    assert faults(chain_rows(CHAIN, 0, FIRST, [prepared])) == []


def test_half_characters_and_no_numbers_can_be_recorded() -> None:
    record = AuditRecord(
        request_id="r",
        model="m\ud800\0",
        decisions=(DecisionEntry(direction="prompt", action="allow", check_ms=float("nan")),),
    )
    assert json.loads(prepare(record).body)["model"] == "m??"
    assert len(prompt_hmac(KEY, "\ud800")) == 64


def test_prompt_hash_needs_the_key() -> None:
    assert prompt_hmac(KEY, "Hello") == prompt_hmac(KEY, "Hello")
    assert prompt_hmac(KEY, "Hello") != prompt_hmac(b"x" * 32, "Hello")
    assert prompt_hmac(KEY, "Hello") != prompt_hmac(KEY, "Hello ")


def test_salt_hides_a_deleted_text() -> None:
    first, second = (prepare(AuditRecord(request_id="r"), {"prompt": "same"}) for _ in range(2))
    assert first.record.text_sha256 != second.record.text_sha256


def test_decision_takes_what_matters_of_the_verdicts() -> None:
    verdict = Verdict(
        outcome=Outcome.UNSAFE, score=0.912345, categories={"S1": 0.912345, "S2": 0.00001}, model_id="m", reason="quote"
    )
    entry = DecisionEntry.of("response", "refuse", [verdict], shadow=True, categories=("S1",), characters=200)
    assert entry.model_dump(exclude_none=True) == {
        "direction": "response",
        "action": "refuse",
        "shadow": True,
        "categories": ("S1",),
        "verdicts": ({"outcome": "unsafe", "score": 0.9123, "categories": {"S1": 0.9123, "S2": 0.0}},),
        "characters": 200,
    }


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.key"
    with pytest.raises(ConfigError, match="cannot read the audit key"):
        read_audit_key(path)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        read_audit_key(path)
    path.write_bytes(KEY)
    assert read_audit_key(path) == KEY
    assert read_audit_key(None) != read_audit_key(None)  # nothing is built in


def test_anchors_are_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    lines = ["no json", json.dumps({"event": "refused"})]
    lines += [json.dumps({"event": "audit anchor", "chain": CHAIN, "seq": 3, "hash": FIRST})]
    log.write_text("\n".join(lines))
    assert list(logged_anchors(log)) == [Anchor(CHAIN, 3, FIRST)]
    log.write_text('{"event": "audit anchor", "chain": 1}')
    with pytest.raises(ConfigError, match="cannot be read"):
        list(logged_anchors(log))
    with pytest.raises(ConfigError, match="cannot read the log"):
        list(logged_anchors(tmp_path / "none"))
