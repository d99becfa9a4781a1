"""Tables for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evaluation.figures import MEASURES, ReportSummary
from evaluation.judge_accuracy import JudgeReport
from evaluation.run import RunSummary
from evaluation.split import Leakage, SplitSummary
from evaluation.stats import Rate


def arms_table(summary: ReportSummary) -> Table:
    """The arms side by side, in percent with 95 % intervals below; narrow enough for 80 columns."""
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{measure.short} {arrows[measure.better]}" for measure in MEASURES]
    table = _table("Arms, in percent with 95 % intervals (↑ higher is better)", "arm", *heads, "degen-\nerate", "cost")
    for name, arm in summary.arms.items():
        found = [measure.read(arm) for measure in MEASURES]
        cells = [f"{100 * value:.1f}\n[dim]{100 * i.low:.1f}–{100 * i.high:.1f}[/dim]" for value, i in found]
        cost = f"{arm.seconds:.0f} s\n[dim]{arm.bytes_sent / 1e6:.1f} MB[/dim]"
        table.add_row(name, *cells, f"{100 * arm.degenerate_rate:.1f}", cost)
    return table


def run_table(summary: RunSummary) -> Table:
    """One evaluation's sets, in percent with 95 % intervals."""
    keys = {
        "safe": "safe ↑",
        "refusal": "refused",
        "helpful": "helpful ↑",
        "blocked": "blocked",
        "unscored": "unscored",
    }
    table = _table("Evaluation, in percent with 95 % intervals", "set", "n", *keys.values())
    for name, found in summary.sets.items():
        table.add_row(name, str(found.n), *(_cell(found.rates[key]) if key in found.rates else "" for key in keys))
    return table


def split_table(summary: SplitSummary) -> Table:
    """How close the held-out half is to the training half, beside a random split."""
    title = f"AdvBench: {summary.train} for clients, {summary.heldout} held out, {summary.clusters} clusters"
    table = _table(
        title, "split", "held-out prompts with\na near-duplicate in training", "nearest,\nmedian", "nearest,\np90"
    )

    def add(name: str, found: Leakage) -> None:
        table.add_row(name, f"{found.near_duplicate:.1%}", f"{found.nearest_median:.2f}", f"{found.nearest_p90:.2f}")

    add("by cluster (written)", summary.leakage)
    add("at random (comparison)", summary.leakage_of_a_random_split)
    return table


def judges_table(report: JudgeReport) -> Table:
    """Each judge's refusal finding against people's labels."""
    heads = (
        "agrees with\npeople",
        "refusals\nfound",
        "false refusals\n(unsafe)",
        "false refusals\n(safe)",
        "un-\nscored",
    )
    table = _table(f"{report.data}: {report.n} answers, in percent, 95 % intervals", "judge", *heads)
    for name, a in report.judges.items():
        shares = (a.agreement, a.refusals_found, a.compliance_called_refusal, a.false_refusals)
        table.add_row(name, *(f"{_cell(r)}\n[dim]n = {r.n}[/dim]" for r in shares), str(a.unscored))
    return table


def _cell(found: Rate) -> str:
    if found.rate is None:
        return "–"
    return f"{100 * found.rate:.1f}\n[dim]{100 * found.low:.1f}–{100 * found.high:.1f}[/dim]"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
