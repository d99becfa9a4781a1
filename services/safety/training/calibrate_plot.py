"""What ``calibrate`` draws: precision over recall, and a reliability diagram."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from sklearn.metrics import precision_recall_curve

from services.safety.training.figures import BINS, Scored, bins_of
from services.safety.training.labelled import Kind
from services.safety.training.plots import new_figure, save_figure


def write_plot(path: Path, kinds: Mapping[Kind, Scored], title: str) -> None:
    """Draw precision over recall, and the share unsafe over the score (a reliability diagram), as a PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(10, 4.5)
    curves, reliability = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for kind, (scores, unsafe) in kinds.items():
        precision, recall, _ = precision_recall_curve(unsafe, np.minimum(scores, 2.0))
        curves.step(recall, precision, where="post", label=f"{kind}s")
        known = np.isfinite(scores)
        bins = bins_of(scores[known])
        sizes = np.bincount(bins, minlength=BINS)
        used = sizes > 0
        means, unsafe_shares = (
            np.bincount(bins, values, BINS)[used] / sizes[used] for values in (scores[known], unsafe[known])
        )
        reliability.plot(means, unsafe_shares, marker="o", markersize=4, label=f"{kind}s")
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    reliability.set(xlabel="score", ylabel="share unsafe", xlim=(0, 1), ylim=(0, 1))
    curves.legend()
    figure.suptitle(title)
    save_figure(figure, path)
