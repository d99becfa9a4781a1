"""The soak's figures: the slope of memory with its interval, streams at once, and options that make no sense."""

import math

import pytest

from gateway.bench.processes import PeerFailed
from gateway.bench.soak import Sample, Stream, read_options
from gateway.bench.soak_report import growth, open_at, steady

SECONDS = [float(second) for second in range(0, 3600, 10)]


def test_growth_is_the_slope_with_an_interval_that_noise_widens() -> None:
    exact = growth(SECONDS, [100 + 5 * second / 3600 for second in SECONDS])
    assert exact == {"mb_per_hour": 5.0, "interval": [5.0, 5.0], "n": 16}
    noisy = growth(SECONDS, [100 + math.sin(second) + math.sin(second / 500) for second in SECONDS])
    low, high = noisy["interval"]
    assert low < noisy["mb_per_hour"] < high
    assert high - low > 0.5


def test_interval_is_that_of_students_t() -> None:
    # By hand: x = 0, 1, 2 hours, y = 0, 1, 0: slope 0, residual 2/3 on 1 degree of freedom, t = 12.706.
    found = growth([0, 3600, 7200], [0, 1, 0])
    assert found["n"] == 3
    assert found["mb_per_hour"] == 0.0
    assert found["interval"] == [pytest.approx(-7.34, abs=0.01), pytest.approx(7.34, abs=0.01)]


def test_stream_is_open_from_its_first_text_to_its_end() -> None:
    streams = [Stream(0.0, 1.0, 4.0, None), Stream(0.0, 3.0, 5.0, None), Stream(0.0, None, 9.0, "HTTP 503, complete")]
    assert [open_at(streams, moment) for moment in (0.5, 1.0, 3.5, 4.0, 6.0)] == [0, 1, 2, 1, 0]


def test_steady_leaves_the_warm_up_out() -> None:
    samples = [
        Sample(second, 300.0 if second < 60 else 90.0 + second % 20 / 10, 40, 12, 0, 7, int(second) * 3, second / 2)
        for second in SECONDS[:60]
    ]
    streams = [Stream(second, second + 1, second + 2, None) for second in SECONDS[:60]]
    found = steady(samples, streams, warm_up=60)
    assert found["rss_mb"]["high"] < 100
    assert (found["cpu_share"], found["checks_per_second"]) == (0.5, 3.0)
    assert found["open_at_model"] == {"low": 7, "median": 7.0, "high": 7}
    assert found["first_text_seconds"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0, "n": 53}
    with pytest.raises(PeerFailed, match="lower the load"):
        steady(samples, streams, warm_up=580)


@pytest.mark.parametrize("wrong", [["--streams", "0"], ["--minutes", "1", "--words", "100", "--word-ms", "1000"]])
def test_options_that_make_no_sense_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(wrong)
