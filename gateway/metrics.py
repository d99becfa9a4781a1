"""What the gateway counts, beside the metrics that every process has; and the tripwire behind its main promise."""

from collections import defaultdict

from prometheus_client import Counter, Histogram

from gateway.policy import Action, Decision, Direction
from services.contracts.hazards import HazardCategory

DECISIONS = Counter(
    "fedward_gateway_decisions_total",
    "Checks by what came of them: allow, redact, revise, refuse, shadowed, unavailable",
    ["direction", "outcome"],
)
UNSAFE = Counter(
    "fedward_gateway_unsafe_total",
    "Texts found unsafe, once for each hazard category that led to it (none: the overall score did), by outcome",
    ["direction", "category", "outcome"],
)
REPAIRS = Counter(
    "fedward_gateway_repairs_total",
    "What was to be redacted or revised, by what came of it; anything but done is refused",
    ["action", "outcome"],
)
CHECK_SECONDS = Histogram(
    "fedward_gateway_check_seconds",
    "Time a check waited for its verdicts or failure; checks of one moment share a call of the classifier",
    ["direction"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5),
)
RELEASED_BEFORE_VERDICT = Counter(
    "fedward_gateway_characters_released_before_verdict_total",
    "Characters of an answer that were about to leave without a verdict; anything but 0 is a bug",
)
UPSTREAM_CANCELLATIONS = Counter(
    "fedward_gateway_upstream_cancellations_total", "Generations that were stopped before they had ended"
)

_CATEGORIES = frozenset(category.value for category in HazardCategory)

Lane = tuple[int, str]  # a choice's index and one of its channels
_MAIN: Lane = (0, "content")


class UncheckedRelease(RuntimeError):
    """Text was about to leave without a verdict: a bug in the gateway, and the answer is withheld."""


def count(decision: Decision) -> None:
    """Count one decision. A classifier's own names for categories are one: each label value costs memory for good."""
    outcome = "shadowed" if decision.shadowed else decision.action.value
    DECISIONS.labels(decision.direction.value, outcome).inc()
    if decision.shadowed or not decision.allowed:
        for category in [name if name in _CATEGORIES else "other" for name in decision.categories] or ["none"]:
            UNSAFE.labels(decision.direction.value, category, outcome).inc()


class Ledger:
    """Bookkeeping for one answer, kept apart from the code that releases text, so that a bug there is caught.

    Only decisions move it forward; ``release`` refuses what they do not cover, letter by letter. So what was removed
    cannot leave, and what stands in its place has to be allowed like everything else. Each channel of each choice has
    its own account, and a choice that was refused releases nothing more.
    """

    def __init__(self) -> None:
        self._prompt_allowed = False
        self._allowed: defaultdict[Lane, str] = defaultdict(str)  # and has not left yet
        self._refused: set[int] = set()

    def record(self, decision: Decision, text: str = "", lane: Lane = _MAIN) -> None:
        """Note what was decided on the prompt, or on what is to leave next in one lane of the answer."""
        if decision.direction is Direction.PROMPT:
            self._prompt_allowed = decision.allowed
        elif decision.allowed:
            self._allowed[lane] += text
        elif decision.action is Action.REFUSE:
            self._refused.add(lane[0])

    def release(self, text: str, lane: Lane = _MAIN) -> str:
        """Hand ``text`` back for sending; raises UncheckedRelease when any of it has not been allowed."""
        open_to_it = self._prompt_allowed and lane[0] not in self._refused
        allowed = self._allowed[lane] if open_to_it else ""
        if not allowed.startswith(text):
            RELEASED_BEFORE_VERDICT.inc(len(text))
            raise UncheckedRelease("text was about to be released without a verdict")
        self._allowed[lane] = allowed.removeprefix(text)
        return text
