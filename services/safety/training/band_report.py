"""What ``band`` prints and draws: the curve, the chosen band, and warnings."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from services.contracts.verdicts import Accuracy
from services.safety.training.band_curve import Cases, Step, is_sent
from services.safety.training.calibrate_report import markdown_table, share_cell
from services.safety.training.figures import Bools, accuracy
from services.safety.training.labelled import Kind
from services.safety.training.plots import new_figure, save_figure

SHOWN = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
COLUMNS = ["sent", "band", "recall", "recall gained", "false positives", "precision", "F1", ""]


def report(cases: Cases, kinds: Mapping[Kind, Bools], steps: Sequence[Step], chosen: Step | None) -> str:
    """The curve, the chosen band by kind of item, and what is wrong with them.

    Args:
        cases: the items.
        kinds: which of them (n,) are prompts, and which responses.
        steps: the curve, from narrow to wide.
        chosen: the step that the service is to run, or None when the guard model does not help.
    """
    parts = [f"the cascade by the share of items that it sends to the guard model\n{_curve(steps, chosen)}"]
    if chosen:
        parts.append(f"the chosen band, before and after\n{_by_kind(cases, kinds, chosen)}")
    return "\n\n".join([*parts, *_warnings(cases, chosen)]) + "\n"


def _curve(steps: Sequence[Step], chosen: Step | None) -> str:
    """A row for each share of ``SHOWN`` that the data can tell from the one before, and one for the chosen step."""
    body, sent = [], -1
    for one in steps:
        if one is chosen or (one.at_most in SHOWN and one.sent != sent):
            body.append(_row(one, "<- chosen" if one is chosen else ""))
            sent = one.sent
    return markdown_table(COLUMNS, body)


def _row(one: Step, note: str) -> list[str]:
    found = one.accuracy
    return [
        f"{one.share:.1%}",
        f"{one.band.low:.4g} to {one.band.high:.4g}" if one.band else "embedded alone",
        share_cell(found.recall, found.recall_interval),
        f"{one.recall_gained:+.3f}",
        share_cell(found.false_positives, found.false_positives_interval),
        share_cell(found.precision),
        share_cell(found.f1),
        note,
    ]


def _by_kind(cases: Cases, kinds: Mapping[Kind, Bools], chosen: Step) -> str:
    sent = is_sent(cases.scores, chosen.band)
    both = np.where(sent, cases.second, cases.first)
    body = []
    for kind, rows in kinds.items():
        alone, after = (accuracy(flagged[rows], cases.unsafe[rows]) for flagged in (cases.first, both))
        cells = [cell for found in (alone, after) for cell in _shares(found)]
        body.append([f"{kind}s", str(int(rows.sum())), f"{sent[rows].mean():.1%}", *cells])
    head = ["of", "items", "sent", "recall alone", "false positives alone", "recall", "false positives"]
    return markdown_table(head, body)


def _shares(found: Accuracy) -> list[str]:
    return [
        share_cell(found.recall, found.recall_interval),
        share_cell(found.false_positives, found.false_positives_interval),
    ]


def _warnings(cases: Cases, chosen: Step | None) -> Iterator[str]:
    if chosen is None:
        yield "THE GUARD MODEL DOES NOT RAISE F1 ON THIS DATA AT ANY BAND: run the embedded model alone"
        return
    if chosen.f1_gained <= 0.0:
        yield f"WARNING: the band gains nothing here: F1 changes by {chosen.f1_gained:+.3f}"
    yield "The band was chosen on these items, so expect a little less on others."


def write_plot(path: Path, steps: Sequence[Step], chosen: Step | None, title: str) -> None:
    """Draw recall and false positives, with their intervals, over the share sent to the guard model, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    sent = [one.share for one in steps]
    for name in ("recall", "false_positives"):
        axes.plot(sent, [getattr(one.accuracy, name) for one in steps], label=name.replace("_", " "))
        low, high = zip(*(getattr(one.accuracy, f"{name}_interval") for one in steps), strict=True)
        axes.fill_between(sent, low, high, alpha=0.2)
    if chosen:
        axes.axvline(chosen.share, color="0.5", linestyle="--", label="chosen band")
    axes.set(xlabel="share sent to the guard model", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.legend()
    save_figure(figure, path)
