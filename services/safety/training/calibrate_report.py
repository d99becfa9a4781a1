"""What ``calibrate`` prints: sweeps, points, categories, rankings, and warnings."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Accuracy, Verdict
from services.safety.calibration import Calibration, PointName
from services.safety.training.figures import Scored, accuracy, lowest_threshold
from services.safety.training.labelled import Kind, Labelled

SWEEP = (0.005, 0.01, 0.02, 0.05, 0.08, 0.1, 0.2)
LEAST_RECALL = 0.5  # below it a filter lets more harm through than it holds back
COLUMNS = ["recall", "false positives", "precision", "F1", "H-mean"]


def report(
    calibration: Calibration,
    kinds: Mapping[Kind, Scored],
    items: Sequence[Labelled],
    verdicts: Sequence[Verdict],
    shares: Mapping[PointName, float],
) -> str:
    """Everything that was found, as text: sweeps, points, categories, rankings, and what is wrong with it."""
    parts = [f"{calibration.model_id} on {calibration.data}, {calibration.rows} items; intervals are at 95 %"]
    for kind, found in kinds.items():
        parts.append(f"{kind}s: what a share of false positives buys\n{_sweep(found)}")
    parts.append(f"operating points\n{_points(calibration)}")
    parts += [_categories(calibration, items), _rankings(calibration), _refusals(items, verdicts)]
    parts += warnings(calibration, kinds, shares)
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, rule, *body]
    )


def cells(found: Accuracy) -> list[str]:
    """The cells of ``COLUMNS``."""
    return [
        share_cell(found.recall, found.recall_interval),
        share_cell(found.false_positives, found.false_positives_interval),
        *map(share_cell, (found.precision, found.f1, found.h_mean)),
    ]


def share_cell(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A share with its interval; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else "")


def _sweep(found: Scored) -> str:
    body = []
    for share in SWEEP:
        threshold = lowest_threshold(found.scores, found.unsafe, share)
        body.append([f"{share:.1%}", f"{threshold:.4g}", *cells(accuracy(found.scores >= threshold, found.unsafe))])
    return markdown_table(["at most", "threshold", *COLUMNS], body)


def _points(calibration: Calibration) -> str:
    body = []
    for name, point in calibration.points.items():
        measured = calibration.measured[name]
        for kind, threshold, found in (
            ("prompts", point.prompt_threshold, measured.prompt),
            ("responses", point.response_threshold, measured.response),
        ):
            shown = cells(found) if found else ["none in the data; threshold kept", *"----"]
            body.append([name, kind, f"{threshold:.4g}", *shown])
    return markdown_table(["point", "of", "threshold", *COLUMNS], body)


def _categories(calibration: Calibration, items: Sequence[Labelled]) -> str:
    body = []
    for name, measured in calibration.measured.items():
        for hazard, found in measured.categories.items():
            title = f"{hazard} {HazardCategory(hazard).readable}"
            threshold = calibration.points[name].categories[hazard]
            body.append([name, title, str(found.unsafe), f"{threshold:.4g}", *cells(found)])
    table = markdown_table(["point", "category", "items", "threshold", *COLUMNS], body) if body else ""
    counts = Counter(item.category for item in items if item.category is not None)
    few = [hazard for hazard in counts if hazard not in calibration.measured["balanced"].categories]
    left_out = ", ".join(f"{hazard} ({counts[hazard]})" for hazard in sorted(few, key=list(HazardCategory).index))
    note = f"left out, having too few items: {left_out}" if few else ""
    return "\n".join(part for part in ("categories, each against all safe items" if body else "", table, note) if part)


def _rankings(calibration: Calibration) -> str:
    rankings = {"prompts": calibration.prompt_ranking, "responses": calibration.response_ranking}
    return "\n".join(
        f"{kind}: AUPRC {share_cell(ranking.auprc, ranking.auprc_interval)}, ECE {ranking.ece:.3f}"
        for kind, ranking in rankings.items()
        if ranking
    )


def _refusals(items: Sequence[Labelled], verdicts: Sequence[Verdict]) -> str:
    known = [
        (verdict.refused, item.refused)
        for item, verdict in zip(items, verdicts, strict=True)
        if item.refused is not None and verdict.refused is not None
    ]
    if not known:
        return ""
    found, labels = np.array(known, bool).T
    figures = accuracy(found, labels)
    return (
        f"refusals, {len(known)} labelled responses: found {share_cell(figures.recall, figures.recall_interval)}, "
        f"others taken for one {share_cell(figures.false_positives, figures.false_positives_interval)}"
    )


def warnings(
    calibration: Calibration, kinds: Mapping[Kind, Scored], shares: Mapping[PointName, float]
) -> Iterator[str]:
    """What is wrong with a calibration, or with the data (``kinds``) that it comes from; one line each."""
    for kind, found in kinds.items():
        if unscored := int(np.isinf(found.scores).sum()):
            yield f"WARNING: {unscored} of {len(found.scores)} {kind}s are unscored; they count as flagged"
        for name, share in shares.items():
            measured = calibration.measured[name]
            figures = measured.prompt if kind == "prompt" else measured.response
            assert figures
            yield from (f"WARNING: {line}" for line in _shortcomings(name, kind, share, figures))


def _shortcomings(name: PointName, kind: Kind, share: float, figures: Accuracy) -> Iterator[str]:
    if figures.safe * share < 1:
        yield (
            f"{figures.safe} safe {kind}s are few for {name}: at {share:.1%} not one of them may be flagged; "
            f"label at least {round(1 / share)}"
        )
    if (figures.false_positives or 0.0) > share:
        yield (
            f"no threshold keeps false positives on {kind}s at {share:.1%}: {figures.false_positives:.1%} at {name} "
            "is the least that this classifier can do"
        )
    if name == "balanced" and (figures.recall or 0.0) < LEAST_RECALL:
        yield (
            f"RECALL ON {kind.upper()}S IS ONLY {figures.recall:.1%} AT {name}: most of what is unsafe in your data "
            "passes, and a federated run refuses to curate with such a filter (min-filter-recall). Tune the encoder on "
            "your data (python -m services.safety tune), run the point strict, or take another model"
        )
