"""What the gateway counts, beside the metrics that every process has; and the tripwire behind its main promise."""

from prometheus_client import Counter, Histogram

from gateway.policy import Decision, Direction

DECISIONS = Counter(
    "fedward_gateway_decisions_total",
    "Checks by what came of them: allow, refuse, unavailable",
    ["direction", "outcome"],
)
CHECK_SECONDS = Histogram(
    "fedward_gateway_check_seconds",
    "Time one check took, from the call to its decision or failure",
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


class UncheckedRelease(RuntimeError):
    """Text was about to leave without a verdict: a bug in the gateway, and the answer is withheld."""


class Ledger:
    """Bookkeeping for one answer, kept apart from the code that releases text, so that a bug there is caught.

    Only decisions move it forward; ``release`` refuses what they do not cover.
    """

    def __init__(self) -> None:
        self.prompt_allowed = False
        self.checked_characters = 0
        self.released_characters = 0

    def record(self, decision: Decision, characters: int = 0) -> None:
        """Note what was decided on the prompt, or on the next ``characters`` of the answer."""
        if decision.direction is Direction.PROMPT:
            self.prompt_allowed = decision.allowed
        elif decision.allowed:
            self.checked_characters += characters

    def release(self, text: str) -> str:
        """Hand ``text`` back for sending; raises UncheckedRelease when any of it has not been allowed."""
        end = self.released_characters + len(text)
        unchecked = end - (self.checked_characters if self.prompt_allowed else 0)
        if text and unchecked > 0:
            RELEASED_BEFORE_VERDICT.inc(min(unchecked, len(text)))
            raise UncheckedRelease("text was about to be released without a verdict")
        self.released_characters = end
        return text
