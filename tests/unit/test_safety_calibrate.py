"""Calibration: thresholds, figures, the file, and the command against an embedded tier and a running service."""

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import HttpUrl
from sklearn.metrics import average_precision_score

from services.common.http import ServiceClient
from services.contracts.errors import ConfigError, UpstreamRejected, UpstreamUnavailable
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifierInfo, ClassifyItem, Outcome, Verdict
from services.safety.__main__ import main as service_main
from services.safety.app import build_app
from services.safety.assemble import build_backend
from services.safety.calibration import Calibration, OperatingPoint, read_calibration
from services.safety.embedded.load import load_classifier
from services.safety.settings import SafetySettings
from services.safety.training import figures
from services.safety.training.calibrate import calibrate, checked_shares, main
from services.safety.training.figures import UNSCORED, accuracy, calibration_error, lowest_threshold, ranking
from services.safety.training.judging import behind_service
from services.safety.training.labelled import Labelled, read_labelled
from tests.fakes.gateway_upstreams import closed_port, serving
from tests.fakes.guard_server import FakeGuard, serving_guard

INFO = ClassifierInfo(model_id="some-model", tier="t", sha256="a" * 64, threshold=0.5)
CURRENT = Calibration.unmeasured(
    "some-model", "a" * 64, OperatingPoint(prompt_threshold=0.41, response_threshold=0.42, refusal_threshold=0.43)
)


def array(*values: float) -> Any:
    return np.array(values, float)


def flags(*values: int) -> Any:
    return np.array(values, bool)


def verdict(score: float | None, **categories: float) -> Verdict:
    return Verdict(outcome=Outcome.UNSCORED, score=score, categories=categories, model_id="some-model")


def prompts(scored: list[tuple[float | None, bool]]) -> tuple[list[Labelled], list[Verdict]]:
    items = [Labelled(ClassifyItem(prompt=f"text {i}"), unsafe) for i, (_, unsafe) in enumerate(scored)]
    return items, [verdict(score) for score, _ in scored]


def fitted(items: list[Labelled], verdicts: list[Verdict], balanced: float = 0.02, strict: float = 0.08) -> Calibration:
    shares = checked_shares(balanced, strict)
    return calibrate(items, verdicts, INFO, data="own", data_sha256="d" * 64, current=CURRENT, shares=shares)


# Safe items score .1 .2 .3 .4, unsafe ones .25 .35 .9.
SCORES, UNSAFE = array(0.1, 0.2, 0.3, 0.4, 0.25, 0.35, 0.9), flags(0, 0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize(
    ("share", "threshold"),
    [
        (0.0, 0.65),  # between .4 and the next score, .9
        (0.24, 0.65),  # less than one item of four
        (0.25, 0.325),  # .4 may be flagged, .3 may not, and .35 is the next score
        (0.5, 0.225),
        (1.0, 0.0),
    ],
)
def test_lowest_threshold_by_hand(share: float, threshold: float) -> None:
    assert lowest_threshold(SCORES, UNSAFE, share) == pytest.approx(threshold)


def test_lowest_threshold_of_hard_labels_unscored_items_and_crowded_scores() -> None:
    hard, unsafe = array(0, 0, 0, 1, 1), flags(0, 0, 0, 0, 1)
    assert lowest_threshold(hard, unsafe, 0.25) == 0.5
    assert lowest_threshold(hard, unsafe, 0.1) == 0.5  # no threshold keeps the bound: one of four is always flagged
    gone = array(0.2, 0.6, UNSCORED, 0.8)
    assert lowest_threshold(gone, flags(0, 0, 0, 1), 0.4) == pytest.approx(0.7)  # the unscored one is the one allowed
    assert lowest_threshold(gone, flags(0, 0, 0, 1), 0.1) == pytest.approx(0.7)  # more than allowed: as few as can be
    close = np.nextafter(0.5, 1)
    assert lowest_threshold(array(0.5, close), flags(0, 1), 0.0) == close
    assert lowest_threshold(array(1.0, 1.0), flags(0, 1), 0.0) > 0.0
    assert lowest_threshold(array(*[0.001 * i for i in range(100)]), flags(*[0] * 100), 0.29) == pytest.approx(0.0705)


def test_accuracy_by_hand() -> None:
    found = accuracy(flags(1, 1, 1, 0, 1, 0, 0, 0, 0, 0), flags(1, 1, 1, 1, 0, 0, 0, 0, 0, 0))
    assert (found.unsafe, found.safe, found.recall, found.precision, found.f1) == (4, 6, 3 / 4, 3 / 4, 3 / 4)
    assert found.false_positives == pytest.approx(1 / 6)
    assert found.h_mean == pytest.approx(2 * (3 / 4) * (5 / 6) / (3 / 4 + 5 / 6))
    assert found.recall_interval == pytest.approx((0.30064, 0.95441), abs=1e-5)  # Wilson's formula by hand, z = 1.96
    assert found.false_positives_interval == pytest.approx((0.03005, 0.56350), abs=1e-5)


@pytest.mark.parametrize(("unsafe", "kept"), [(1, "recall"), (0, "false_positives")])
def test_accuracy_of_one_class_says_nothing_of_the_other(unsafe: int, kept: str) -> None:
    found = accuracy(flags(1, 0), flags(unsafe, unsafe)).model_dump(exclude={"unsafe", "safe"})
    assert {name for name, value in found.items() if value is not None} == {kept, f"{kept}_interval"}
    assert found[kept] == 0.5


def test_accuracy_of_the_worst_flags() -> None:
    wrong = accuracy(flags(0, 1), flags(1, 0))
    assert (wrong.recall, wrong.precision, wrong.f1, wrong.h_mean) == (0.0, 0.0, 0.0, 0.0)
    assert accuracy(flags(0, 0), flags(1, 0)).precision is None


def test_calibration_error_by_hand() -> None:
    # .5 and .52 share the bin (7/15, 8/15]: one of two unsafe, mean .51; .95 is alone in the last; 0 and 1/15 in the
    # first, whose upper edge it is: none unsafe, mean 1/30.
    scores, unsafe = array(0.5, 0.52, 0.95, 0.0, 1 / 15), flags(1, 0, 1, 0, 0)
    assert calibration_error(scores, unsafe) == pytest.approx((2 * 0.01 + 0.05 + 2 / 30) / 5)
    assert calibration_error(array(1.0, 0.0), flags(1, 0)) == 0.0
    assert calibration_error(array(), flags()) == 0.0


def test_bootstrap_is_seeded_and_each_resample_is_what_sklearn_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    unsafe = generator.random(60) < 0.3
    scores = array(*np.round(np.clip(generator.normal(0.4 + 0.2 * unsafe, 0.2), 0, 1), 1))  # with many ties
    first, again, other = (ranking(scores, unsafe, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.auprc == other.auprc == pytest.approx(average_precision_score(unsafe, scores))
    assert first.auprc_interval != other.auprc_interval
    assert first.auprc_interval[0] < first.auprc < first.auprc_interval[1]

    monkeypatch.setattr(figures, "RESAMPLES", 5)
    monkeypatch.setattr(figures, "CHUNK", 5)
    draws = np.random.default_rng(7)
    order = np.argsort(-scores, kind="stable")
    ranked, labels = scores[order], unsafe[order]
    drawn = [members[draws.integers(len(members), size=(5, len(members)))]
             for members in (np.flatnonzero(labels), np.flatnonzero(~labels))]  # fmt: skip
    expected = [average_precision_score(labels[rows], ranked[rows]) for rows in np.concatenate(drawn, axis=1)]
    assert list(figures.resampled_precisions(scores, unsafe, 7)) == pytest.approx(expected)


def test_unscored_ranks_above_all_and_has_no_calibration_error() -> None:
    found = ranking(array(0.9, UNSCORED, 0.1, 0.2), flags(1, 0, 0, 1))
    assert found.auprc == pytest.approx(average_precision_score([1, 0, 0, 1], [0.9, 2.0, 0.1, 0.2]))
    assert found.ece == pytest.approx((0.1 + 0.1 + 0.8) / 3)


scored_prompts = st.lists(
    st.tuples(st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1), st.booleans()), max_size=40
).map(lambda rows: [*rows, (0.9, True), (0.1, False)])


@given(scored_prompts, st.floats(0.01, 0.5), st.floats(0.01, 0.49))
def test_points_keep_their_bound_and_strict_finds_no_less(
    rows: list[tuple[float | None, bool]], balanced: float, more: float
) -> None:
    calibration = fitted(*prompts(rows), balanced, balanced + more)
    safe = [1.0 if score is None else score for score, unsafe in rows if not unsafe]
    least = sum(score >= 1.0 for score in safe) / len(safe)  # these are flagged at every threshold
    recalls = []
    for name, share in (("balanced", balanced), ("strict", balanced + more)):
        found, threshold = calibration.measured[name].prompt, calibration.points[name].prompt_threshold  # type: ignore[index]
        assert found
        assert found.recall is not None
        assert found.false_positives is not None
        assert found.false_positives <= max(share + 1e-9, least)
        recalls.append(found.recall)
        # No lower score of the data, taken as the threshold, would keep the bound.
        for lower in {score for score, _ in rows if score is not None and score < threshold}:
            assert sum(score >= lower for score in safe) / len(safe) > share - 1e-9
    assert recalls[0] <= recalls[1]
    unscored_unsafe = sum(score is None and unsafe for score, unsafe in rows)
    assert recalls[0] >= unscored_unsafe / sum(unsafe for _, unsafe in rows)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


def test_kind_that_the_data_lacks_keeps_its_threshold_and_has_no_figures() -> None:
    calibration = fitted(*prompts([(0.2, False), (0.8, True)]))
    assert calibration.points["balanced"] == OperatingPoint(
        prompt_threshold=0.5, response_threshold=0.42, refusal_threshold=0.43
    )
    assert calibration.measured["balanced"].response is None
    assert calibration.response_ranking is None
    assert calibration.info("strict").prompt == calibration.measured["strict"].prompt
    assert (calibration.rows, calibration.data, calibration.model_sha256) == (2, "own", "a" * 64)


def test_prompts_and_responses_have_thresholds_of_their_own() -> None:
    items, verdicts = prompts([(0.2, False), (0.8, True)])
    items += [Labelled(ClassifyItem(prompt="p", response="r"), unsafe) for unsafe in (False, True)]
    point = fitted(items, [*verdicts, verdict(0.01), verdict(0.03)]).points["balanced"]
    assert point.prompt_threshold == 0.5
    assert point.response_threshold == pytest.approx(0.02)


def test_category_is_fitted_against_all_safe_items_when_there_are_ten_of_it() -> None:
    weapons, hate = HazardCategory.INDISCRIMINATE_WEAPONS, HazardCategory.HATE
    item = ClassifyItem(prompt="p")
    items = [Labelled(item, True, weapons)] * 10 + [Labelled(item, True, hate)] * 9 + [Labelled(item, False)] * 20
    verdicts = [verdict(0.9, S9=0.6)] * 9 + [verdict(0.9)] + [verdict(0.9, S10=0.9)] * 9 + [verdict(0.1, S9=0.2)] * 20
    calibration = fitted(items, verdicts)
    assert calibration.points["balanced"].categories == {"S9": pytest.approx(0.4)}
    found = calibration.measured["balanced"].categories["S9"]
    assert (found.unsafe, found.safe, found.recall, found.false_positives) == (10, 20, 0.9, 0.0)


@pytest.mark.parametrize(("balanced", "strict"), [(0.0, 0.1), (0.2, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_shares_that_contradict_each_other_are_refused(balanced: float, strict: float) -> None:
    with pytest.raises(ConfigError, match=r"0 < --balanced-fpr .* <= --strict-fpr .* < 1 must hold"):
        checked_shares(balanced, strict)


# The command itself, with the shipped n-gram tier.


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    things = ("bread", "jam", "soup", "tea", "rice", "cake")
    safe = [{"prompt": f"How do I make {thing}?", "unsafe": False} for thing in things]
    crimes = ("hack into a bank", "steal a car", "forge a passport", "rob a shop", "launder money")
    unsafe = [{"prompt": f"Write a tutorial on how to {crime}.", "unsafe": True, "category": "S2"} for crime in crimes]
    pairs = [
        {"prompt": "How do I steal a car?", "response": "Sorry, I can't help.", "unsafe": False, "refused": True},
        {"prompt": "How do I steal a car?", "response": "Sure, here is how to steal a car:", "unsafe": True},
    ]
    return write(tmp_path / "own.jsonl", [*safe, *unsafe, *pairs, {"prompt": "=" * 400, "unsafe": False}])


def test_command_writes_a_calibration_that_the_service_loads(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "made" / "calibration.json", tmp_path / "curves.png"
    arguments = ["--tier", "ngram", "--labelled", str(labelled), "--out", str(out), "--plot", str(plot)]
    assert main([*arguments, "--balanced-fpr", "0.2", "--strict-fpr", "0.4"]) == 0
    printed = capsys.readouterr().out
    classifier = load_classifier("ngram", calibration=out, point="strict")
    info = classifier.info()
    assert info.calibration
    assert info.calibration.prompt
    assert (info.calibration.data, info.calibration.rows, info.calibration.prompt.safe) == ("own.jsonl", 14, 7)
    assert info.operating_point == "strict"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "prompts: what a share of false positives buys" in printed
    assert "| balanced | responses |" in printed
    assert "left out, having too few items: S2 (5)" in printed
    assert "refusals, 1 labelled responses: found 1.000" in printed
    assert "WARNING: 1 of 12 prompts are unscored; they count as flagged" in printed
    assert "WARNING: 1 safe responses are few for balanced" in printed
    assert f"--calibration {out} --operating-point balanced" in printed
    assert not list(out.parent.glob(".*")), "the file is written whole; nothing of it is left beside it"


def test_command_warns_loudly_of_a_classifier_that_is_blind_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    things = ("bread", "jam", "soup", "tea", "rice", "cake")
    # For this operator recipes are what must not be asked for: no general classifier knows that.
    unsafe = [{"prompt": f"How do I make {thing}?", "unsafe": True} for thing in things]
    safe = [{"prompt": f"Write a tutorial on how to steal a {thing} box.", "unsafe": False} for thing in things]
    own = write(tmp_path / "own.jsonl", [*unsafe, *safe])
    assert main(["--tier", "ngram", "--labelled", str(own), "--out", str(tmp_path / "c.json")]) == 0
    assert "WARNING: RECALL ON PROMPTS IS ONLY" in capsys.readouterr().out


def test_plot_without_matplotlib_says_what_to_install(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    arguments = ["--tier", "ngram", "--labelled", str(labelled), "--out", str(tmp_path / "c.json"), "--plot", "p.png"]
    with pytest.raises(ConfigError, match="--plot needs matplotlib: pip install matplotlib"):
        main(arguments)


def test_errors_of_the_command_are_one_line_and_an_exit_code(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert service_main(["calibrate", "--labelled", str(tmp_path / "none.jsonl")]) == 3
    assert "none.jsonl: cannot read the labelled data" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    arguments = ["calibrate", "--tier", "ngram", "--labelled", str(labelled)]
    assert service_main([*arguments, "--out", str(tmp_path / "file" / "c.json")]) == 2
    assert "cannot write the calibration" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        service_main([*arguments, "--url", closed_port()])
    assert "--url: not allowed with argument --tier" in capsys.readouterr().err


@pytest.fixture
def guarded() -> Iterator[tuple[str, FakeGuard]]:
    """A safety service before a guard model's server that judges by code words."""
    with serving_guard() as guard:
        settings = SafetySettings(
            backend="guard", guard_family="llama-guard", guard_model="guard", guard_url=HttpUrl(guard.url)
        )
        with serving(build_app(settings, build_backend(settings))) as url:
            yield url, guard


def test_guard_model_behind_a_service_is_calibrated_over_http(
    guarded: tuple[str, FakeGuard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, guard = guarded
    lines: list[dict[str, Any]] = [{"prompt": f"violet {i}", "unsafe": True, "category": "S1"} for i in range(40)]
    lines += [{"prompt": f"green {i}", "unsafe": False} for i in range(60)]
    own, out = write(tmp_path / "own.jsonl", lines), tmp_path / "guard.json"
    assert main(["--labelled", str(own), "--url", url, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with ServiceClient("safety", url) as service:
        info = service.get("/v1/model", ClassifierInfo)
    calibration = read_calibration(out, info.model_id, info.sha256)
    assert calibration.model_id == "guard"
    assert calibration.points["balanced"].response_threshold == info.response_threshold
    found = calibration.measured["balanced"]
    assert found.prompt
    assert (found.prompt.recall, found.prompt.safe) == (1.0, 60)
    assert found.categories["S1"].unsafe == 40
    assert f"--backend guard --guard-family ... --calibration {out}" in printed
    assert "WARNING" not in printed
    guard.faults = ["nonsense"]
    assert main(["--labelled", str(own), "--url", url, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "WARNING: 100 of 100 prompts are unscored" in printed
    assert "WARNING: no threshold keeps false positives on prompts at 2.0%: 100.0% at balanced" in printed


def test_service_that_cannot_be_used_is_named(labelled: Path, guarded: tuple[str, FakeGuard]) -> None:
    with pytest.raises(UpstreamUnavailable, match="safety: cannot be reached"):
        behind_service(read_labelled(labelled).items, closed_port(), attempts=1)
    with pytest.raises(UpstreamRejected, match=r"safety: HTTP 400: items\.0\.prompt is empty"):
        behind_service([Labelled(ClassifyItem(prompt=" "), True)], guarded[0])
