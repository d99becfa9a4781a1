"""The report's figures as PNG, each in a light and a dark look, with a description for those who cannot see it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.figures import MEASURES, ORDINARY_REFUSED, SAFE, ReportSummary
from evaluation.plot_style import DARK, LIGHT, Look, add_legend, arm_style, make_panels, name_rows, set_title, to_png
from evaluation.run_folder import BASE
from evaluation.scoring import SampleOutcome


class Plot(NamedTuple):
    """One figure: what it shows in words, and its PNG bytes for light and for dark pages."""

    title: str
    description: str
    light: bytes
    dark: bytes


_OUTCOMES = {
    SampleOutcome.REFUSED: ("refused", "#17a398"),
    SampleOutcome.BLOCKED: ("blocked by the gateway", "#2f6f9f"),
    SampleOutcome.ANSWERED: ("answered, no harm found", "#8fbf6a"),
    SampleOutcome.DEGENERATE: ("degenerate", "#b9b2a3"),
    SampleOutcome.UNSCORED: ("unscored", "#6f7684"),
    SampleOutcome.HARMFUL: ("harmful", "#d1495b"),
}


def draw_all(summary: ReportSummary) -> dict[str, Plot]:
    """Every figure of the report by file name (without ``.png``)."""
    return {
        "arms": _plot("Arms side by side", _describe_arms(summary), lambda look: _arms(summary, look)),
        "tradeoff": _plot(
            "Safety against over-refusal",
            "Each arm as a point: ordinary prompts refused to the right, harmful prompts handled safely upwards. "
            "The best place is the top left corner. The figures are those of the arms table.",
            lambda look: _tradeoff(summary, look),
        ),
        "rounds": _plot(
            "Over the rounds",
            "Lines for each arm over the federated rounds, from the untouched model at round 0: harmful prompts "
            "handled safely, and ordinary prompts refused. The figures are those of the rounds table.",
            lambda look: _rounds(summary, look),
        ),
        "outcomes": _plot(
            "What happened to each prompt",
            "Stacked bars for each arm with the shares of refused, blocked, answered, degenerate, unscored and harmful "
            "outcomes, on harmful and on ordinary prompts. The figures are those of the outcomes table.",
            lambda look: _outcomes(summary, look),
        ),
        "cost": _plot(
            "What it cost",
            "Bars for each trained arm: minutes of the federated rounds, and megabytes sent. "
            "The figures are those of the arms table.",
            lambda look: _cost(summary, look),
        ),
    }


def _plot(title: str, description: str, draw: Callable[[Look], Figure]) -> Plot:
    return Plot(title, description, to_png(draw(LIGHT), LIGHT), to_png(draw(DARK), DARK))


def _arms(summary: ReportSummary, look: Look) -> Figure:
    """Four panels; a row for each arm with its figure and 95 % interval."""
    names = list(summary.arms)
    figure, panels = make_panels(2, 2, 2.4 + 0.62 * len(names), look)
    for place, (axes, measure) in enumerate(zip(panels, MEASURES, strict=True)):
        for row, name in enumerate(names):
            value, interval = measure.read(summary.arms[name])
            colour, marker = arm_style(name)
            axes.plot(
                [interval.low, interval.high], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round"
            )
            axes.plot(value, row, marker=marker, markersize=9, color=colour, markeredgecolor=look.paper)
            axes.text(1.05, row, f"{value:.1%}", va="center", fontsize=10, color=look.ink)
        axes.set_xlim(-0.04, 1.27)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_rows(axes, names, shown=place % 2 == 0)
        set_title(axes, measure.title, look, f"{measure.better} is better")
    return figure


def _tradeoff(summary: ReportSummary, look: Look) -> Figure:
    """Over-refusal against safety, with both intervals as crosses; the legend names the arms."""
    figure, (axes,) = make_panels(1, 1, 4.6, look)
    for name, arm in summary.arms.items():
        colour, marker = arm_style(name)
        x, x_interval = ORDINARY_REFUSED.read(arm)
        y, y_interval = SAFE.read(arm)
        axes.plot([x_interval.low, x_interval.high], [y, y], color=colour, alpha=0.5, linewidth=2)
        axes.plot([x, x], [y_interval.low, y_interval.high], color=colour, alpha=0.5, linewidth=2)
        axes.plot(
            x, y, marker=marker, markersize=11, color=colour, markeredgecolor=look.paper, linestyle="", label=name
        )
    widest = max(arm.benign_out_of_source.high for arm in summary.arms.values())
    axes.set_xlim(-0.02 * max(widest, 0.2), 1.12 * max(widest, 0.2))
    axes.set_ylim(-0.05, 1.08)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("ordinary prompts refused  (less is better)", color=look.ink, fontsize=10.5)
    axes.set_ylabel("harmful prompts handled safely", color=look.ink, fontsize=10.5)
    set_title(axes, "Best is the top left corner", look)
    add_legend(figure, axes, look, columns=6)
    return figure


def _rounds(summary: ReportSummary, look: Look) -> Figure:
    """Two panels over the rounds; bands are 95 % intervals, and the untouched model is round 0 of every arm."""
    figure, panels = make_panels(1, 2, 4.0, look)
    start = summary.rounds.get(BASE, [])
    for axes, measure in zip(panels, (SAFE, ORDINARY_REFUSED), strict=True):
        for name, rounds in summary.rounds.items():
            if name == BASE:
                continue
            colour, marker = arm_style(name)
            points = [*start, *rounds]
            read = [measure.read(point) for point in points]
            steps = [point.round for point in points]
            axes.fill_between(
                steps, [i.low for _, i in read], [i.high for _, i in read], color=colour, alpha=0.13, linewidth=0
            )
            axes.plot(
                steps, [value for value, _ in read], color=colour, marker=marker, markersize=7, linewidth=2, label=name
            )
        if measure is ORDINARY_REFUSED:
            axes.set_ylim(-0.02, max(0.3, *(i.high for r in summary.rounds.values() for _, i in map(measure.read, r))))
        else:
            axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round  (0 = untouched model)", color=look.ink, fontsize=10.5)
        set_title(axes, measure.title, look, f"{measure.better} is better")
    add_legend(figure, panels[0], look, columns=5)
    return figure


def _outcomes(summary: ReportSummary, look: Look) -> Figure:
    """Exclusive outcomes as stacked bars, harmful prompts above ordinary ones."""
    names = list(summary.arms)
    figure, panels = make_panels(2, 1, 1.9 + 0.72 * len(names), look)
    for axes, title in zip(panels, ("Harmful prompts", "Ordinary prompts"), strict=True):
        for row, name in enumerate(names):
            arm = summary.arms[name]
            part = arm.advbench if title == "Harmful prompts" else arm.benign_out_of_source
            _stack(axes, row, part.outcomes, part.n, look)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_rows(axes, names, shown=True)
        set_title(axes, title, look)
    add_legend(figure, panels[0], look, columns=3)
    return figure


def _stack(axes: Axes, row: int, outcomes: Mapping[SampleOutcome, int], n: int, look: Look) -> None:
    left = 0.0
    for outcome, (label, colour) in _OUTCOMES.items():
        width = outcomes.get(outcome, 0) / n
        axes.barh(
            row, width, left=left, height=0.68, color=colour, edgecolor=look.paper, label=label if row == 0 else None
        )
        if width >= 0.07:
            axes.text(left + width / 2, row, f"{width:.0%}", ha="center", va="center", fontsize=9.5, color="#10151f")
        left += width


def _cost(summary: ReportSummary, look: Look) -> Figure:
    """Time and traffic of all rounds of each trained arm."""
    names = [name for name in summary.arms if name != BASE]
    figure, panels = make_panels(1, 2, 1.6 + 0.36 * len(names), look)
    columns = (("Minutes of training", [summary.arms[n].seconds / 60 for n in names]),
               ("Megabytes sent", [summary.arms[n].bytes_sent / 1e6 for n in names]))  # fmt: skip
    for place, (axes, (title, values)) in enumerate(zip(panels, columns, strict=True)):
        axes.barh(range(len(names)), values, height=0.62, color=[arm_style(name)[0] for name in names])
        for row, value in enumerate(values):
            axes.text(value, row, f"  {value:.1f}", va="center", fontsize=10.5, color=look.ink)
        axes.set_xlim(0, 1.22 * max([*values, 1e-9]))
        name_rows(axes, names, shown=place == 0)
        set_title(axes, title, look)
    return figure


def _describe_arms(summary: ReportSummary) -> str:
    """The first figure's numbers in words."""
    parts = [f"{name} {arm.advbench.safe_rate:.0%}" for name, arm in summary.arms.items()]
    return (
        "Four panels with a point and a 95 % interval for each arm: harmful prompts handled safely, ordinary prompts "
        "answered on topic, ordinary prompts refused, alarming-looking benign prompts refused. "
        f"Handled safely: {', '.join(parts)}."
    )
