"""The look of the report's figures: colours, panels, titles and legends."""

import io
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evaluation.run_folder import BASE


class Look(NamedTuple):
    """Colours of a figure's surroundings."""

    ink: str
    faint: str
    grid: str
    paper: str


LIGHT = Look(ink="#1d2433", faint="#5c667a", grid="#e3e7ee", paper="#ffffff")
DARK = Look(ink="#e8ecf4", faint="#a3adc2", grid="#2f3849", paper="#171c26")

# Colour-blind safe on both papers; every arm also has its own marker.
_ARMS = {
    BASE: ("#8b93a3", "o"),
    "clean": ("#5aa9e6", "s"),
    "none": ("#d1495b", "X"),
    "filter": ("#e0a030", "^"),
    "cai": ("#9b6dd6", "D"),
    "filter+cai": ("#17a398", "P"),
}
_OTHER_ARM = ("#c06ca0", "v")


def to_png(figure: Figure, look: Look) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, facecolor=look.paper, metadata={"Software": None})
    return buffer.getvalue()


def make_panels(rows: int, columns: int, height: float, look: Look) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the report's column (7.2 in), ``height`` inches high, with its panels row by row."""
    figure = Figure(figsize=(7.2, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    for axes in panels:
        axes.set_facecolor(look.paper)
        axes.tick_params(colors=look.ink, labelsize=10.5, length=0)
        axes.grid(color=look.grid, linewidth=0.9)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(look.grid)
    return figure, panels


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm, the same in every figure."""
    return _ARMS.get(arm, _OTHER_ARM)


def set_title(axes: Axes, text: str, look: Look, note: str = "") -> None:
    """A panel's title, with a fainter note below it."""
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=look.ink, pad=22 if note else 8)
    if note:
        axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9.5, color=look.faint, va="bottom")


def name_rows(axes: Axes, names: list[str], *, shown: bool) -> None:
    """One row for each arm, the first at the top."""
    axes.set_yticks(range(len(names)), names if shown else [""] * len(names))
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def add_legend(figure: Figure, axes: Axes, look: Look, *, columns: int) -> None:
    """One legend below all panels, from the entries of one of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10, labelcolor=look.ink
    )
