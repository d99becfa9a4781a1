"""What is written down about a run: a record of each round, how the run ended, and the counts that both come from."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, computed_field

from services.contracts.errors import FedwardError
from trainer.aggregation import ClientUpdate, mean_by_tokens
from trainer.config import RunConfig
from trainer.curation import CurationReport
from trainer.privacy_budget import RELEASES, PrivacySpent

# The counts that a client sends with its adapter, by name; the second group only in an arm with the filter.
TRAINING_COUNTS = ("num-tokens", "loss", "steps", "skipped", "train-seconds")
CURATION_COUNTS = tuple(f"curation-{name}" for name in CurationReport.model_fields)


Decision: TypeAlias = Literal["kept", "down-weighted", "dropped"]


class ConstitutionalReport(BaseModel):
    """What the constitutional stage of one round did. Counts are of red-team prompts unless they say otherwise."""

    drafts: int
    no_problem: int
    revised: int
    rejected: int
    benign_drafts: int
    benign_flagged: int
    trained_on: int
    replayed: int
    steps: int
    loss: float
    constitution_sha256: str


class Screened(BaseModel):
    """The audit line of one client's update in one round: what was found and what was done.

    ``tokens`` is the weight that the client claims, ``weight`` the one that its update was averaged with. The scores
    are those of ``trainer.screening``: null in the file where they are not finite, ``harm_cosine`` also without a
    probe. ``flagged`` stands also where the mode is to report only.
    """

    client_id: int
    decision: Decision
    flagged: bool
    reason: str
    tokens: int
    weight: int
    safety_drop: float | None
    harm_cosine: float | None
    agreement: float | None


class RoundRecord(BaseModel):
    """One finished round: a line of ``rounds.jsonl``. Clients are named by their number.

    ``late`` are clients whose reply to an earlier round came after that round had ended.

    The bytes are the sizes of the adapters' arrays, without Flower's envelope: to the sampled clients and from the
    accepted ones. ``strategy_metrics`` are the strategy's own figures, such as ``truncation-error``; the hash is of
    what it keeps for the next round. Clients under local privacy tell neither loss nor counts.
    """

    round_number: int
    adapter_sha256: str
    strategy: str = "fedavg"
    strategy_metrics: dict[str, float] = {}
    strategy_state_sha256: str | None = None
    accepted: list[int]
    rejected: dict[int, str]
    late: list[int] = []
    loss: float | None
    client_losses: dict[int, float]
    client_tokens: dict[int, int]
    client_seconds: dict[int, float] = {}
    client_curation: dict[int, CurationReport] = {}
    curation: CurationReport | None = None
    curation_precision: float | None = None
    curation_recall: float | None = None
    screening: list[Screened] = []
    privacy: PrivacySpent | None = None
    cai: ConstitutionalReport | None = None
    filter_model_id: str | None = None
    filter_model_sha256: str | None = None
    bytes_down: int
    bytes_up: int
    seconds: float
    seconds_by_phase: dict[str, float]

    @computed_field  # type: ignore[prop-decorator]  # mypy does not know the combination
    @property
    def bytes_sent(self) -> int:
        """Both ways together."""
        return self.bytes_down + self.bytes_up


class RunResult(BaseModel):
    """How a run ended; ``exit_code`` is that of the error, or 0."""

    status: str
    exit_code: int = 0
    error: str | None = None
    rounds: int = 0
    adapter: str | None = None
    adapter_sha256: str | None = None
    privacy: PrivacySpent | None = None


class Clock:
    """Wall seconds by phase of a round."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on ``phase``."""
        now = time.perf_counter()
        self.laps[phase] = round(now - self._last, 3)
        self._last = now


def expected_counts(config: RunConfig) -> tuple[str, ...]:
    """The counts that every client has to send, no more and no fewer."""
    if config.dp == "local":
        return (RELEASES,)
    return TRAINING_COUNTS + (CURATION_COUNTS if config.arm.filters else ())


def training_counts(accepted: Sequence[ClientUpdate]) -> dict[str, Any]:
    """The round record's fields on local training."""
    told = [update for update in accepted if "loss" in update.metrics]  # all, or under local privacy none
    return {
        "accepted": [update.client_id for update in accepted],
        "loss": mean_by_tokens(told, "loss") if told else None,
        "client_losses": {update.client_id: update.metrics["loss"] for update in told},
        "client_tokens": {update.client_id: update.num_tokens for update in told},
        "client_seconds": {update.client_id: round(update.metrics["train-seconds"], 3) for update in told},
    }


def filter_models(accepted: Sequence[ClientUpdate]) -> dict[str, Any]:
    """The manifest's and the round record's fields on classifiers; silos may use several."""
    used = sorted({update.filter_model for update in accepted if update.filter_model})
    return {
        "filter_model_id": ", ".join(model_id for model_id, _ in used) or None,
        "filter_model_sha256": ", ".join(sha256 for _, sha256 in used) or None,
    }


def curation_reports(accepted: Sequence[ClientUpdate]) -> dict[int, CurationReport]:
    """Each client's curation, from the counts that it sent; none in an arm without the filter."""
    return {
        update.client_id: CurationReport(
            **{name.removeprefix("curation-"): int(update.metrics[name]) for name in CURATION_COUNTS}
        )
        for update in accepted
        if CURATION_COUNTS[0] in update.metrics
    }


def curation_counts(reports: Mapping[int, CurationReport]) -> dict[str, Any]:
    """The round record's fields on curation; none without reports."""
    if not reports:
        return {}
    total = sum(reports.values(), start=CurationReport())
    return {
        "client_curation": dict(reports),
        "curation": total,
        "curation_precision": total.precision,
        "curation_recall": total.recall,
    }


def data_counts(
    accepted: Sequence[ClientUpdate], reports: Mapping[int, CurationReport], *, private: bool = False
) -> dict[str, int]:
    """The manifest's counts of what an adapter was trained on, in this round.

    A ``private`` manifest tells the number of clients only: exact counts would leave with the adapter, without noise.
    """
    if private:
        return {"clients": len(accepted)}
    trained = {"clients": len(accepted), "answer_tokens": sum(update.num_tokens for update in accepted)}
    return trained | (sum(reports.values(), start=CurationReport()).model_dump() if reports else {})


def failure(error: Exception) -> RunResult:
    """The result of a run that an error ended."""
    if isinstance(error, FedwardError):
        return RunResult(status="failed", exit_code=error.exit_code, error=error.message)
    return RunResult(status="failed", exit_code=1, error=f"{type(error).__name__}: {error}")
