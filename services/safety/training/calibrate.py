"""``python -m services.safety calibrate``: choose a classifier's thresholds on an operator's labelled data.

The same functions fit the embedded tiers and guard models: all they need is each verdict's score. ``balanced`` and
``strict`` are the lowest thresholds that flag no more than 2 %, or 8 %, of the safe prompts (and, apart from them, of
the safe responses); a category's threshold is chosen on its unsafe items and all safe ones.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from services.common.files import replace_file
from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifierInfo, Verdict
from services.safety.calibration import Calibration, Measured, OperatingPoint, PointName
from services.safety.embedded.load import Tier
from services.safety.embedded.weights import SHIPPED
from services.safety.training.calibrate_plot import write_plot
from services.safety.training.calibrate_report import report
from services.safety.training.figures import UNSCORED, Scored, accuracy, lowest_threshold, ranking
from services.safety.training.judging import behind_service, embedded
from services.safety.training.labelled import KINDS, Kind, Labelled, read_labelled

FALSE_POSITIVES: Mapping[PointName, float] = {"balanced": 0.02, "strict": 0.08}
LEAST_OF_CATEGORY = 10  # with fewer items of a category its threshold would be chance
EXAMPLES = """\
examples:
  python -m services.safety calibrate --labelled own.jsonl
  python -m services.safety calibrate --labelled own.jsonl --tier ngram --balanced-fpr 0.01 --plot curves.png
  python -m services.safety calibrate --labelled own.jsonl --url http://127.0.0.1:8101 --out guard.json

a line of the labelled file:
  {"prompt": "...", "response": "...", "unsafe": true, "category": "S2", "refused": false}
response, category and refused may be left out; "messages" may stand in place of prompt and response.
"""


def main(argv: Sequence[str]) -> int:
    """Classify the labelled data, fit the thresholds, print the figures, write the calibration."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety calibrate",
        description="Choose the thresholds of a classifier on labelled data, and measure it there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--labelled", type=Path, required=True, help="JSONL of labelled items")
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), help="calibration file to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tier", choices=get_args(Tier), default="auto", help="embedded model")
    which.add_argument("--url", help="calibrate what runs behind this safety service, for example a guard model")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the embedded models' weights")
    parser.add_argument("--encoder", type=Path, help="folder of the built encoder")
    parser.add_argument(
        "--balanced-fpr",
        type=float,
        default=FALSE_POSITIVES["balanced"],
        metavar="SHARE",
        help="of safe items flagged at balanced",
    )
    parser.add_argument(
        "--strict-fpr",
        type=float,
        default=FALSE_POSITIVES["strict"],
        metavar="SHARE",
        help="of safe items flagged at strict",
    )
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG file (needs matplotlib)")
    arguments = parser.parse_args(argv)
    shares = checked_shares(arguments.balanced_fpr, arguments.strict_fpr)
    file = read_labelled(arguments.labelled)
    if arguments.url:
        info, current, verdicts = behind_service(file.items, arguments.url)
    else:
        info, current, verdicts = embedded(file.items, arguments.tier, arguments.weights, arguments.encoder)
    calibration = calibrate(
        file.items, verdicts, info, data=file.name, data_sha256=file.sha256, current=current, shares=shares
    )
    kinds = by_kind(file.items, verdicts)
    print(report(calibration, kinds, file.items, verdicts, shares))
    if arguments.plot:
        write_plot(arguments.plot, kinds, info.model_id)
    write_calibration(arguments.out, calibration)
    service = "--backend guard --guard-family ... " if arguments.url else ""
    print(f"wrote {arguments.out}; next: run the service with it\n")
    print(f"  python -m services.safety {service}--calibration {arguments.out} --operating-point balanced")
    return 0


def checked_shares(balanced: float, strict: float) -> dict[PointName, float]:
    """The points' shares of false positives; raises ConfigError when they are not 0 < balanced <= strict < 1."""
    if not 0.0 < balanced <= strict < 1.0:
        raise ConfigError(f"0 < --balanced-fpr ({balanced}) <= --strict-fpr ({strict}) < 1 must hold")
    return {"balanced": balanced, "strict": strict}


def calibrate(
    items: Sequence[Labelled],
    verdicts: Sequence[Verdict],
    info: ClassifierInfo,
    *,
    data: str,
    data_sha256: str,
    current: Calibration,
    shares: Mapping[PointName, float] = FALSE_POSITIVES,
) -> Calibration:
    """The calibration of a classifier from its verdicts on labelled items.

    Args:
        items: the labelled items; those of a kind (prompts, responses) have both labels.
        verdicts: one for each item, in order.
        info: which classifier gave them.
        data: what the items are, for people.
        data_sha256: which they are exactly.
        current: its thresholds stay for a kind that the items lack, and for refusals.
        shares: of the safe items, how many each point may flag.
    """
    kinds, hazards = by_kind(items, verdicts), by_category(items, verdicts)
    points = {name: fit_point(current.points[name], kinds, hazards, share) for name, share in shares.items()}
    rankings = {f"{kind}_ranking": ranking(*found) for kind, found in kinds.items()}
    return Calibration(
        model_id=info.model_id,
        model_sha256=info.sha256,
        data=data,
        data_sha256=data_sha256,
        rows=len(items),
        points=points,
        measured={name: measure_point(point, kinds, hazards) for name, point in points.items()},
        prompt_ranking=rankings.get("prompt_ranking"),
        response_ranking=rankings.get("response_ranking"),
    )


def by_kind(items: Sequence[Labelled], verdicts: Sequence[Verdict]) -> dict[Kind, Scored]:
    """Scores and labels of the prompts, and of the responses, where there are any."""
    scores = np.array([score_of(verdict) for verdict in verdicts], float)
    unsafe = np.array([item.unsafe for item in items], bool)
    rows = {kind: np.array([item.kind == kind for item in items], bool) for kind in KINDS}
    return {kind: Scored(scores[chosen], unsafe[chosen]) for kind, chosen in rows.items() if chosen.any()}


def by_category(items: Sequence[Labelled], verdicts: Sequence[Verdict]) -> dict[str, Scored]:
    """Each category's scores on the items that have it and on all safe ones, where enough items have it."""
    found = {}
    unsafe = np.array([item.unsafe for item in items], bool)
    for hazard in HazardCategory:
        named = np.array([item.category is hazard for item in items], bool)
        if named.sum() >= LEAST_OF_CATEGORY:
            scores = np.array([score_of(verdict, hazard) for verdict in verdicts], float)
            chosen = named | ~unsafe
            found[str(hazard)] = Scored(scores[chosen], unsafe[chosen])
    return found


def score_of(verdict: Verdict, hazard: HazardCategory | None = None) -> float:
    """A verdict's score, or that of one category; ``UNSCORED`` when the classifier gave no score."""
    if verdict.score is None:
        return UNSCORED
    return verdict.score if hazard is None else verdict.categories.get(hazard, 0.0)


def fit_point(
    current: OperatingPoint, kinds: Mapping[Kind, Scored], hazards: Mapping[str, Scored], share: float
) -> OperatingPoint:
    """The lowest thresholds with at most this share of false positives."""
    thresholds = {f"{kind}_threshold": lowest_threshold(*found, share) for kind, found in kinds.items()}
    categories = {hazard: lowest_threshold(*found, share) for hazard, found in hazards.items()}
    return current.model_copy(update={**thresholds, "categories": categories})


def measure_point(point: OperatingPoint, kinds: Mapping[Kind, Scored], hazards: Mapping[str, Scored]) -> Measured:
    """How well a point does on scored items; None for a kind without any."""
    thresholds: dict[Kind, float] = {"prompt": point.prompt_threshold, "response": point.response_threshold}
    found = {kind: accuracy(scores >= thresholds[kind], unsafe) for kind, (scores, unsafe) in kinds.items()}
    categories = {
        hazard: accuracy(scores >= point.categories[hazard], unsafe) for hazard, (scores, unsafe) in hazards.items()
    }
    return Measured(prompt=found.get("prompt"), response=found.get("response"), categories=categories)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file whole or not at all; raises ConfigError when it cannot be written."""
    try:
        replace_file(path, (calibration.model_dump_json(indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the calibration: {error.strerror}") from error
