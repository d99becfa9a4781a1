"""The folder of one job, read for a report.

::

    RUN_DIR/base/eval/{summary.json,samples.jsonl}                 the untouched model
    RUN_DIR/arms/<arm>/eval/round-N/{summary.json,samples.jsonl}   an arm after round N
    RUN_DIR/arms/<arm>/rounds.jsonl                                what each round cost, written by the trainer
    RUN_DIR/judges.json                                            optional: the judges' measured accuracy
"""

import re
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from evaluation.datasets import DEFAULT_SETS
from evaluation.files import read_json, read_jsonl
from evaluation.run import SUMMARY, RunSummary
from evaluation.samples import SAMPLES
from evaluation.scoring import Sample
from services.contracts.errors import ConfigError, DataError

BASE = "base"
ARM_ORDER = (BASE, "clean", "none", "filter", "cai", "filter+cai")
_ROUND = re.compile(r"round-(\d+)")


class RoundCost(BaseModel):
    """The part of a line of ``rounds.jsonl`` that the report reads; the trainer may write more."""

    model_config = ConfigDict(extra="ignore")

    seconds: float = Field(ge=0)
    bytes_sent: int = Field(ge=0)
    filter_model_sha256: str | None = None


class ArmRun(NamedTuple):
    """One arm: its evaluations by round, the samples of the last one in order, and the cost of each round."""

    name: str
    folder: Path
    evaluations: dict[int, RunSummary]
    samples: list[Sample]
    costs: list[RoundCost]

    @property
    def last_round(self) -> int:
        """The round whose evaluation stands for the arm."""
        return max(self.evaluations)

    @property
    def final(self) -> RunSummary:
        """The evaluation that stands for the arm."""
        return self.evaluations[self.last_round]


def read_run_folder(folder: Path) -> list[ArmRun]:
    """Read every arm that was evaluated, the known arms first and in their usual order.

    Raises:
        ConfigError: there is no evaluation, or two evaluations are not comparable (the message names both).
        DataError: a file is malformed.
    """
    arms = [_read_arm(path.name, path) for path in sorted((folder / "arms").glob("*")) if (path / "eval").is_dir()]
    if (folder / BASE / "eval").is_dir():
        arms.append(_read_arm(BASE, folder / BASE))
    if not arms:
        raise ConfigError(f"{folder}: no evaluation under {BASE}/eval or arms/*/eval/round-N; run one first")
    _check_comparable(arms)
    rank = {name: place for place, name in enumerate(ARM_ORDER)}
    return sorted(arms, key=lambda arm: (rank.get(arm.name, len(rank)), arm.name))


def _read_arm(name: str, folder: Path) -> ArmRun:
    if name == BASE:
        by_round = {0: folder / "eval"}
    else:
        found = [(_ROUND.fullmatch(path.name), path) for path in (folder / "eval").iterdir()]
        by_round = {int(match[1]): path for match, path in found if match}
    if not by_round:
        raise ConfigError(f"{folder / 'eval'}: no round-N folder in it")
    evaluations = {number: read_json(path / SUMMARY, RunSummary) for number, path in sorted(by_round.items())}
    samples = read_jsonl(by_round[max(by_round)] / SAMPLES, Sample)
    expected = evaluations[max(by_round)].n
    if len(samples) != expected:
        raise DataError(f"{by_round[max(by_round)] / SAMPLES}: {len(samples)} samples, but {SUMMARY} counts {expected}")
    costs_path = folder / "rounds.jsonl"
    costs = read_jsonl(costs_path, RoundCost) if costs_path.exists() else []
    return ArmRun(name, folder, evaluations, samples, costs)


def _check_comparable(arms: list[ArmRun]) -> None:
    """Refuse arms or rounds that differ in prompts, decoding or judge from the first one."""
    first = arms[0].final
    for arm in arms:
        for number, evaluation in arm.evaluations.items():
            difference = _difference(first, evaluation)
            if difference:
                raise ConfigError(
                    f"{arm.name} round {number} and {arms[0].name} round {arms[0].last_round} cannot be compared: "
                    f"{difference}; evaluate both in the same way"
                )


def _difference(first: RunSummary, other: RunSummary) -> str | None:
    for name in DEFAULT_SETS:
        here, there = other.sets.get(name), first.sets.get(name)
        if here is None or there is None:
            return f"the set {name} is missing"
        if here.sha256 != there.sha256:
            return f"the set {name} has other prompts (sha256 {here.sha256[:12]} against {there.sha256[:12]})"
    if other.decoding != first.decoding:
        return f"other decoding ({other.decoding} against {first.decoding})"
    if other.judge.sha256 != first.judge.sha256:
        return f"another judge (sha256 {other.judge.sha256[:12]} against {first.judge.sha256[:12]})"
    return None
