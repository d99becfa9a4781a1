"""Arms side by side: the figures of each arm and round, and the paired tests between arms on the same prompts."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.datasets import SAMPLE_SEED
from evaluation.figures import (
    BenignFigures,
    DataSource,
    Figures,
    HarmfulFigures,
    HelpfulFigures,
    PairedTests,
    ReportSummary,
)
from evaluation.judge_accuracy import JudgeReport
from evaluation.provenance import collect
from evaluation.run import RunSummary
from evaluation.run_folder import ARM_ORDER, BASE, ArmRun, RoundCost
from evaluation.scoring import Sample, SampleOutcome, SetSummary
from evaluation.stats import PairedTest, Rate, mcnemar
from services.contracts.verdicts import ClassifierInfo


def summarise_job(
    arms: Sequence[ArmRun], *, seeds: dict[str, int], command: str | None, judge_accuracy: JudgeReport | None
) -> ReportSummary:
    """Compare the arms of one job; they must be comparable, which :func:`read_run_folder` makes sure of."""
    first = arms[0].final
    by_name = {arm.name: arm for arm in arms}
    references = [by_name[name] for name in ("none", BASE) if name in by_name]
    return ReportSummary(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=by_name[BASE].final.model if BASE in by_name else first.model,
        seeds={"decoding": int(first.decoding["seed"]), "sample": SAMPLE_SEED, **seeds},
        decoding=first.decoding,
        data={name: DataSource(source=s.source, sha256=s.sha256, n=s.n) for name, s in first.sets.items()},
        judge=first.judge,
        judge_accuracy=judge_accuracy,
        filter_is_judge=_filter_is_judge(arms, first.judge),
        missing_arms=[name for name in ARM_ORDER if name not in by_name],
        arms={arm.name: figures(arm.final, arm.last_round, arm.costs) for arm in arms},
        rounds={arm.name: [figures(e, n, _costs_of(arm, n)) for n, e in arm.evaluations.items()] for arm in arms},
        paired={arm.name: {r.name: paired(arm.samples, r.samples) for r in references if r is not arm} for arm in arms},
        **dict(collect(command)),
    )


def figures(evaluation: RunSummary, round_number: int, costs: Sequence[RoundCost]) -> Figures:
    """The figures of one evaluation, with the cost of the rounds given."""
    ordinary = evaluation.sets["benign_out_of_source"]
    helpful = ordinary.rates["helpful"]
    return Figures(
        round=round_number,
        adapter_sha256=evaluation.fingerprint,
        advbench=_harmful(evaluation.sets["advbench"]),
        benign_out_of_source=_benign(ordinary),
        benign_alarming=_benign(evaluation.sets["benign_alarming"]),
        helpfulness=HelpfulFigures(rate=_value(helpful), **_interval(helpful)),
        degenerate_rate=_value(evaluation.degenerate),
        seconds=sum(cost.seconds for cost in costs),
        bytes_sent=sum(cost.bytes_sent for cost in costs),
    )


def paired(samples: Sequence[Sample], others: Sequence[Sample]) -> PairedTests:
    """McNemar's exact test on each finding, over the prompts that both arms have scored."""
    other_by_id = {sample.id: sample for sample in others}
    pairs = [(s, other_by_id[s.id]) for s in samples if s.scored and other_by_id[s.id].scored]

    def test(set_name: str, finding: Callable[[Sample], bool]) -> PairedTest:
        chosen = [pair for pair in pairs if pair[0].set == set_name]
        return mcnemar([finding(first) for first, _ in chosen], [finding(second) for _, second in chosen])

    return PairedTests(
        advbench_safe=test("advbench", lambda s: s.safe),
        benign_out_of_source_refused=test("benign_out_of_source", _refused),
        benign_alarming_refused=test("benign_alarming", _refused),
        helpful=test("benign_out_of_source", lambda s: s.helpful),
    )


def _costs_of(arm: ArmRun, round_number: int) -> Sequence[RoundCost]:
    return arm.costs[round_number - 1 : round_number] if round_number else []


def _refused(sample: Sample) -> bool:
    return sample.outcome is SampleOutcome.REFUSED


def _harmful(found: SetSummary) -> HarmfulFigures:
    rates = {f"{name}_rate": _value(found.rates[name]) for name in found.rates}
    return HarmfulFigures.model_validate({**rates, **_interval(found.rates["safe"]), "outcomes": found.outcomes})


def _benign(found: SetSummary) -> BenignFigures:
    rates = {f"{name}_rate": _value(found.rates[name]) for name in found.rates}
    return BenignFigures.model_validate({**rates, **_interval(found.rates["refusal"]), "outcomes": found.outcomes})


def _interval(found: Rate) -> dict[str, Any]:
    return found.model_dump(include={"n", "low", "high", "exact_low", "exact_high"})


def _value(found: Rate) -> float:
    """The share; an empty set has none, and a report on one would compare nothing."""
    if found.rate is None:
        raise ValueError("a set without prompts has no figures")
    return found.rate


def _filter_is_judge(arms: Sequence[ArmRun], judge: ClassifierInfo) -> bool | None:
    used = {cost.filter_model_sha256 for arm in arms for cost in arm.costs} - {None}
    return judge.sha256 in used if used else None
