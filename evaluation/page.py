"""The report as one HTML page that needs nothing else: styles inside, figures embedded."""

import base64
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evaluation.figures import MEASURES, Figures, Interval, ReportSummary
from evaluation.plots import Plot
from evaluation.run_folder import ARM_ORDER, BASE
from evaluation.scoring import SampleOutcome
from evaluation.stats import PairedTest, Rate

ARM_NOTES = {
    BASE: "the untouched model",
    "clean": "clients without harmful data (control)",
    "none": "harmful clients, no protection",
    "filter": "clients filter their data",
    "cai": "constitutional stage after aggregation",
    "filter+cai": "both",
}


def render(summary: ReportSummary, plots: Mapping[str, Plot]) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "p_value": p_value,
        "points": points,
        "image": _image,
        "interval": _interval,
        "duration": _duration,
    }
    return environment.get_template("report.html.j2").render(
        summary=summary,
        plots=plots,
        answer=answer(summary),
        price=price(summary),
        leading=leading_arm(summary),
        measures=MEASURES,
        outcomes=list(SampleOutcome),
        notes=ARM_NOTES,
    )


def leading_arm(summary: ReportSummary) -> str:
    """The arm that the report is about: the most protected one that was evaluated."""
    known = [name for name in reversed(ARM_ORDER) if name in summary.arms]
    return known[0] if known else next(iter(summary.arms))


def answer(summary: ReportSummary) -> str:
    """The result in a sentence."""
    leading = leading_arm(summary)
    safety = summary.arms[leading].advbench
    found = f"{_subject(leading)} handles {percent(safety.safe_rate)} of {safety.n} held-out harmful prompts safely"
    if leading != "none" and "none" in summary.arms:
        return f"{found}; without protection it is {percent(summary.arms['none'].advbench.safe_rate)}."
    if leading != BASE and BASE in summary.arms:
        return f"{found}; for the untouched model it is {percent(summary.arms[BASE].advbench.safe_rate)}."
    return f"{found}."


def price(summary: ReportSummary) -> str:
    """What that costs in refused ordinary prompts."""
    leading = leading_arm(summary)
    refused = summary.arms[leading].benign_out_of_source
    found = f"The price: it refuses {percent(refused.refusal_rate)} of {refused.n} ordinary prompts from another source"
    if leading != BASE and BASE in summary.arms:
        before = summary.arms[BASE].benign_out_of_source.refusal_rate
        return f"{found}, where the untouched model refuses {percent(before)}."
    return f"{found}."


def _subject(arm: str) -> str:
    return {
        BASE: "The untouched model",
        "clean": "The model trained by clean clients",
        "none": "The model trained without protection",
        "filter": "The model trained on filtered data",
        "cai": "The model with the constitutional stage",
        "filter+cai": "The model with filtering and the constitutional stage",
    }.get(arm, f"The arm {arm}")


def percent(value: float | None) -> str:
    """A share as text, ``96.9 %``, that no line break tears apart; a dash when there is none."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def points(test: PairedTest) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if test.difference is None else f"{100 * test.difference:+.1f}"


def p_value(test: PairedTest) -> str:
    """A p-value as text, without false precision."""
    return "< 0.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"


def _interval(found: Interval | Rate) -> str:
    return f"{100 * found.low:.1f}–{100 * found.high:.1f}"


def _duration(arm: Figures) -> str:
    return f"{arm.seconds:.0f} s" if arm.seconds < 120 else f"{arm.seconds / 60:.1f} min"


def _image(content: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(content).decode()
