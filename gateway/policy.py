"""From verdicts to a decision: a pure function, so that the gateway's policy can be read and tested as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.contracts.errors import UpstreamUnavailable
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Outcome, Verdict


class Direction(StrEnum):
    """Which way the checked text was going."""

    PROMPT = "prompt"
    RESPONSE = "response"


class Action(StrEnum):
    """What the gateway does."""

    ALLOW = "allow"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Policy:
    """Own thresholds in place of the classifier's; None leaves the finding to the classifier."""

    prompt_threshold: float | None = None
    response_threshold: float | None = None

    def threshold(self, direction: Direction) -> float | None:
        """The threshold for one direction."""
        return self.prompt_threshold if direction is Direction.PROMPT else self.response_threshold


@dataclass(frozen=True)
class Decision:
    """What is done with one text, and the hazard categories that led to it (worst first)."""

    action: Action
    direction: Direction
    categories: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """The text may go on."""
        return self.action is Action.ALLOW

    @property
    def reason(self) -> str:
        """One sentence for the client. In our own words: a classifier's free text could quote what is blocked."""
        text = "The prompt" if self.direction is Direction.PROMPT else "The answer"
        if self.allowed:
            return f"{text} was classified as safe."
        names = ", ".join(_readable(category) for category in self.categories)
        return f"{text} was classified as unsafe" + (f": {names}." if names else ".")


def decide(verdicts: Sequence[Verdict], direction: Direction, policy: Policy) -> Decision:
    """Decide on a text from the verdicts on its parts: one unsafe part is enough to refuse.

    Raises:
        UpstreamUnavailable: a part has no verdict and no other part is unsafe, so that nothing can be decided.
    """
    threshold = policy.threshold(direction)
    unsafe = [verdict for verdict in verdicts if _is_unsafe(verdict, threshold)]
    if unsafe:
        return Decision(Action.REFUSE, direction, _categories(unsafe, threshold))
    if not verdicts or any(verdict.outcome is Outcome.UNSCORED for verdict in verdicts):
        raise UpstreamUnavailable("safety", f"gave no verdict on the {direction}, so it cannot be let through")
    return Decision(Action.ALLOW, direction)


def _is_unsafe(verdict: Verdict, threshold: float | None) -> bool:
    if threshold is None or verdict.score is None or verdict.outcome is Outcome.UNSCORED:
        return verdict.outcome is Outcome.UNSAFE
    return verdict.score >= threshold


def _categories(unsafe: Sequence[Verdict], threshold: float | None) -> tuple[str, ...]:
    """The categories over the threshold, worst first; the single worst when none is over it."""
    worst: dict[str, float] = {}
    over: set[str] = set()
    for verdict in unsafe:
        limit = next((t for t in (threshold, verdict.threshold) if t is not None), 0.5)
        for category, score in verdict.categories.items():
            worst[category] = max(score, worst.get(category, 0.0))
            if score >= limit:
                over.add(category)
    ranked = sorted(worst, key=lambda category: (-worst[category], category))
    return tuple(category for category in ranked if category in over) or tuple(ranked[:1])


def _readable(category: str) -> str:
    try:
        return f"{HazardCategory(category).readable} ({category})"
    except ValueError:
        return category
