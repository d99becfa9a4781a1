"""Verdicts on labelled items: by an embedded tier in this process, or by whatever runs behind a safety service."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from services.common.http import ServiceClient
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import ClassifierInfo, ClassifyRequest, ClassifyResponse, Verdict
from services.safety.calibration import Calibration, OperatingPoint
from services.safety.embedded.classifier import EmbeddedClassifier
from services.safety.embedded.load import Tier, load_classifier
from services.safety.training.labelled import Labelled

BATCH = 32  # items at a time; a service takes a limited number in one request


class Judged(NamedTuple):
    """A classifier, the thresholds it runs at, and its verdicts on the items."""

    info: ClassifierInfo
    current: Calibration
    verdicts: list[Verdict]


def embedded(items: Sequence[Labelled], tier: Tier, weights: Path, encoder: Path | None) -> Judged:
    """By an embedded tier; raises ConfigError when it cannot be loaded."""
    classifier = load_classifier(tier, weights=weights, encoder=encoder)
    return Judged(classifier.info(), classifier.calibration, verdicts_of(classifier, items))


def verdicts_of(classifier: EmbeddedClassifier, items: Sequence[Labelled]) -> list[Verdict]:
    """An embedded classifier's verdicts, one for each item, in order."""
    verdicts: list[Verdict] = []
    for start in _starts(items):
        verdicts += classifier.classify_all([item.conversation for item in items[start : start + BATCH]])
    return verdicts


def behind_service(items: Sequence[Labelled], url: str, attempts: int = 4) -> Judged:
    """By a running service, whose thresholds in use stand for both operating points.

    Args:
        items: what it is asked.
        url: where it listens.
        attempts: how often a call is tried before it counts as failed.

    Raises:
        UpstreamError: it cannot be reached, answered with an error, or changed its classifier meanwhile.
    """
    verdicts: list[Verdict] = []
    with ServiceClient("safety", url, attempts=attempts) as service:
        info = service.get("/v1/model", ClassifierInfo)
        for start in _starts(items):
            batch = [item.item for item in items[start : start + BATCH]]
            answer = service.post("/v1/classify", ClassifyRequest(items=batch), ClassifyResponse)
            if len(answer.verdicts) != len(batch):
                raise UpstreamUnavailable("safety", f"answered {len(answer.verdicts)} verdicts for {len(batch)} items")
            verdicts += answer.verdicts
        if service.get("/v1/model", ClassifierInfo) != info:
            raise UpstreamUnavailable("safety", "the classifier was changed while the data was being classified")
    point = OperatingPoint(
        prompt_threshold=info.threshold,
        response_threshold=info.threshold if info.response_threshold is None else info.response_threshold,
        refusal_threshold=0.5,  # a guard model's answer says whether the response declines; nothing compares with this
    )
    return Judged(info, Calibration.unmeasured(info.model_id, info.sha256, point), verdicts)


def _starts(items: Sequence[Labelled]) -> Iterable[int]:
    """Where each batch begins, with a progress bar on stderr: stdout is for the figures."""
    return track(range(0, len(items), BATCH), "classifying", console=Console(stderr=True), transient=True)
