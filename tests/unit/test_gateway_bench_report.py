"""Medians, ratios and goals from measurements with known figures, and peers that fail."""

from typing import Any

import pytest

from gateway.bench.load import ONE, PACED, SIXTEEN, STREAMS, Cell, Work
from gateway.bench.report import goals, guarded, provenance, streams
from gateway.bench.tables import tables


def cell(number: int, work: Work, peer: str, cpu_ms: float, *, per_second: float = 10.0, failed: int = 0) -> Cell:
    failure = "HTTP 500, complete" if failed else None
    return Cell(number, work.name, peer, 100, failed, failure, cpu_ms, per_second, 5.0, 9.0, 4.0)


def cells() -> list[Cell]:
    made = []
    for number, factor in enumerate((1.0, 2.0, 4.0)):  # a machine that gets slower
        for work in (ONE, SIXTEEN, STREAMS, PACED):
            made.append(cell(number, work, "fedward", 2.0 * factor, per_second=120 / factor))
            made.append(cell(number, work, "litellm", 30.0 * factor, per_second=10 / factor))
            made.append(cell(number, work, "portkey", 10.0, failed=100 if work in (STREAMS, PACED) else 1))
    return made


PEERS = ("fedward", "litellm", "portkey")


def test_ratios_are_taken_between_neighbours() -> None:
    found = guarded(cells(), PEERS)
    assert found["fedward"]["cpu_ms_per_request"] == 4.0
    assert found["fedward"]["concurrency"]["16"]["cpu_ms"] == {"median": 4.0, "low": 2.0, "high": 8.0}
    assert found["rps_ratio_vs_litellm"] == pytest.approx(12.0)
    assert found["rps_ratio_vs_litellm_range"] == pytest.approx([12.0, 12.0])
    assert found["cpu_ratio_vs_litellm"] == pytest.approx(1 / 15)


def test_a_peer_that_answers_nothing_has_a_reason_in_place_of_figures() -> None:
    found = streams(cells(), PEERS)
    assert found["fedward"]["cpu_ms_per_stream"] == 4.0
    assert found["portkey"]["cpu_ms_per_stream"] is None
    assert found["portkey"]["failed"] == "none of 300 requests was answered in full: HTTP 500, complete"


def test_single_failures_are_counted_beside_the_figures() -> None:
    sixteen = guarded(cells(), PEERS)["portkey"]["concurrency"]["16"]
    assert (sixteen["failed_requests"], sixteen["first_failure"]) == (3, "HTTP 500, complete")
    assert sixteen["cpu_ms"]["median"] == 10.0


def test_ratio_to_a_peer_without_a_good_answer_is_left_out() -> None:
    failing = [cell(0, SIXTEEN, "fedward", 2.0), cell(0, SIXTEEN, "litellm", 9.0, failed=100)]
    failing += [cell(0, ONE, "fedward", 2.0), cell(0, ONE, "litellm", 9.0, failed=100)]
    found = guarded(failing, ("fedward", "litellm"))
    assert "rps_ratio_vs_litellm" not in found
    assert found["litellm"]["failed"].startswith("none of 100 requests")


def outcome(**fields: Any) -> dict[str, Any]:
    plain = {"status": 503, "end": "complete", "seconds": 0.3, "recovered_seconds": 0.1, "unsafe_text_passed": False}
    return plain | fields


def summary() -> dict[str, Any]:
    leak = {"characters_leaked": 0, "status": 200, "end": "complete"}
    leaked = leak | {"characters_leaked": 26, "end": "error event"}
    found: dict[str, Any] = {
        "peers": {
            "fedward": {"start_seconds": 2.0, "start_rss_mb": 88.0, "rss_mb": 95.0},
            "litellm": {"start_seconds": 30.0, "start_rss_mb": 390.0, "rss_mb": 400.0},
            "portkey": {"failed": "npm is not installed"},
        },
        "guarded": guarded(cells(), PEERS[:2]),
        "stream": streams(cells(), PEERS[:2]),
        "leak": {
            "fedward": {"characters_leaked": 0, "modes": {"stream": leak}, "other_settings": {}},
            "litellm": {"characters_leaked": 26, "modes": {"stream": leaked}, "other_settings": {"every_chunk": leak}},
        },
        "fault": {
            "fedward": {
                "classifier_hang": outcome(),
                "client_leaves": {"generation_cancelled": True, "seconds": 0.1},
            },
            "litellm": {
                "classifier_hang": outcome(
                    status=200, end="still waiting", unsafe_text_passed=True, recovered_seconds=None
                ),
                "client_leaves": {"generation_cancelled": False, "seconds": 3.0},
            },
        },
    }
    return found | {"goals": goals(found)}


def test_goals_say_what_was_met() -> None:
    found = {row["goal"]: row["met"] for row in summary()["goals"]}
    assert found == {
        "guarded request, CPU ms at most 2.5": False,
        "guarded requests/s : LiteLLM's at least 12": True,
        "guarded 50-word stream, CPU ms at most 5": True,
        "memory at start, MB at most 90": True,
        "start, seconds at most 3": True,
        "characters leaked at most 0": True,
        "faults in which unsafe text passed at most 0": True,
    }


def test_goals_of_a_run_without_our_gateway_are_not_measured() -> None:
    found = goals({"peers": {}, "guarded": {}, "stream": {}, "leak": {}, "fault": {}})
    assert {row["met"] for row in found} == {None}


def test_tables_show_every_peer_with_its_failures() -> None:
    text = tables(summary())
    assert "| portkey | failed: npm is not installed |" in text
    assert "| fedward | 4.0 | 4.0 | 60.0 | 5.0 | 9.0 | 4.0 | 4.0 | 88 | 95 | 2.0 |" in text
    assert "| stream | 0 (200, complete) | 26 (200, error event) |" in text
    assert "| stream, every_chunk | - | 0 (200, complete) |" in text
    assert "HTTP 503, 0.3 s | UNSAFE TEXT PASSED, HTTP 200, still waiting, 0.3 s, does not recover |" in text
    assert "| client_leaves | cancelled after 0.1 s | NOT CANCELLED after 3.0 s |" in text
    assert "| memory at start, MB at most 90 | 88.00 | met |" in text


def test_provenance_says_what_ran() -> None:
    found = provenance()
    assert found["schema_version"] == 1
    assert {"git_commit", "versions", "hardware", "seeds"} <= found.keys()
    assert {"httpx", "litellm", "portkey", "node"} <= found["versions"].keys()
