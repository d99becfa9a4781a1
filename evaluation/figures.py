"""The report's vocabulary: what ``summary.json`` of a job holds, and the four measures that lead it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import BaseModel

from evaluation.judge_accuracy import JudgeReport
from evaluation.provenance import Provenance
from evaluation.scoring import SampleOutcome
from evaluation.stats import PairedTest
from services.contracts.verdicts import ClassifierInfo


class Interval(BaseModel):
    """Wilson's interval for display and the exact one, both 95 %, around a figure on ``n`` prompts."""

    n: int
    low: float
    high: float
    exact_low: float
    exact_high: float


class HarmfulFigures(Interval):
    """Held-out harmful prompts; the interval is that of ``safe_rate``."""

    safe_rate: float
    harmful_rate: float
    refusal_rate: float
    affirmative_rate: float
    blocked_rate: float
    degenerate_rate: float
    unscored_rate: float
    refused_but_unsafe_rate: float
    paper_rule_safe_rate: float
    outcomes: dict[SampleOutcome, int]


class BenignFigures(Interval):
    """Benign prompts; the interval is that of ``refusal_rate``, the over-refusal."""

    refusal_rate: float
    blocked_rate: float
    degenerate_rate: float
    unscored_rate: float
    outcomes: dict[SampleOutcome, int]


class HelpfulFigures(Interval):
    """Ordinary prompts that were answered on topic."""

    rate: float


class Figures(BaseModel):
    """Everything that is reported of one arm after one round.

    ``adapter_sha256`` is the fingerprint of the model that answered; for the base model that of its weights.
    """

    round: int
    adapter_sha256: str | None = None
    advbench: HarmfulFigures
    benign_out_of_source: BenignFigures
    benign_alarming: BenignFigures
    helpfulness: HelpfulFigures
    degenerate_rate: float
    seconds: float
    bytes_sent: int


class Measure(NamedTuple):
    """One of the four headline figures: its names, which direction is good, and how to read it off an arm."""

    title: str
    short: str
    better: Literal["higher", "lower"]
    read: Callable[[Figures], tuple[float, Interval]]


SAFE = Measure("Harmful prompts handled safely", "safe", "higher", lambda f: (f.advbench.safe_rate, f.advbench))
HELPFUL = Measure("Ordinary prompts answered", "helpful", "higher", lambda f: (f.helpfulness.rate, f.helpfulness))
ORDINARY_REFUSED = Measure(
    "Ordinary prompts refused",
    "ordinary refused",
    "lower",
    lambda f: (f.benign_out_of_source.refusal_rate, f.benign_out_of_source),
)
ALARMING_REFUSED = Measure(
    "Alarming but benign refused",
    "alarming refused",
    "lower",
    lambda f: (f.benign_alarming.refusal_rate, f.benign_alarming),
)
MEASURES = (SAFE, HELPFUL, ORDINARY_REFUSED, ALARMING_REFUSED)


class PairedTests(BaseModel):
    """One arm against another; each test pairs the prompts that both arms have scored."""

    advbench_safe: PairedTest
    benign_out_of_source_refused: PairedTest
    benign_alarming_refused: PairedTest
    helpful: PairedTest


class DataSource(BaseModel):
    """Which prompts a figure is about."""

    source: str
    sha256: str
    n: int


class ReportSummary(Provenance):
    """What a job's ``summary.json`` holds.

    ``arms`` has each arm after its last round with the cost of all its rounds; ``rounds`` has every evaluated round
    with its own cost; ``paired`` is ``paired[arm][against]``. ``filter_is_judge`` is None when the trainer did not
    record which classifier filtered.
    """

    schema_version: int = 1
    created: str
    model: str
    seeds: dict[str, int]
    decoding: dict[str, int | float]
    data: dict[str, DataSource]
    judge: ClassifierInfo
    judge_accuracy: JudgeReport | None
    filter_is_judge: bool | None
    missing_arms: list[str]
    arms: dict[str, Figures]
    rounds: dict[str, list[Figures]]
    paired: dict[str, dict[str, PairedTests]]
