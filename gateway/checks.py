"""What is put before the classifier: every text, in windows of bounded length; and what its verdicts lead to."""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from gateway.asked import Asked, Kind, has_words
from gateway.metrics import DECISIONS, count
from gateway.policy import Action, Decision, Direction, Policy, decide
from services.common.logs import get_logger
from services.common.spans import span
from services.contracts.errors import FedwardError
from services.contracts.verdicts import ClassifyItem, Verdict

Classify = Callable[[Sequence[ClassifyItem], Direction, float], Awaitable[list[Verdict]]]
Note = Callable[[Decision, Sequence[Verdict], int, float], None]


def windows(text: str, size: int) -> list[str]:
    """Cut a text into windows of ``size`` characters; each repeats the last quarter of the one before.

    A classifier may read only so much and drop the rest in silence; what stands on a border is seen whole all the same.
    """
    if len(text) <= size:
        return [text] if text.strip() else []
    step = size - size // 4
    return [text[start : start + size] for start in range(0, len(text) - size // 4, step)]


def prompt_items(asked: Asked, size: int) -> list[ClassifyItem]:
    """All that the client sent: each turn by itself, then all that is not an answer as one text.

    Each by itself, so that a long harmless conversation does not hide one harmful message, and a polite last turn
    does not hide an earlier one; as one text, so that nothing hides in pieces. An assistant turn is judged as the
    answer to what stands before it. A text without words is only judged with the others: alone it has no verdict.
    """
    items: list[ClassifyItem] = []
    read: list[str] = []
    before = ""
    for turn in asked.turns:
        if not turn.text.strip():
            continue
        if not has_words(turn.text):
            read.append(turn.text)
        elif turn.kind is Kind.ANSWERED and before:
            items += [ClassifyItem(prompt=before, response=part) for part in windows(turn.text, size)]
        else:
            items += [ClassifyItem(prompt=part) for part in windows(turn.text, size)]
            read.append(turn.text)
            if turn.kind is Kind.ASKED:
                before = turn.text[-size:]
    if len(read) > 1:
        items += [ClassifyItem(prompt=part) for part in windows("\n".join(read), size)]
    return items


def response_items(prompt: str, texts: Iterable[str], size: int) -> list[ClassifyItem]:
    """Texts of an answer with the prompt that it answers; no items when there is nothing but white space in them."""
    return [ClassifyItem(prompt=prompt[-size:], response=part) for text in texts for part in windows(text, size)]


class Checker:
    """The checks of one request.

    Args:
        classify: one verdict per item, within seconds; raises FedwardError.
        policy: what verdicts lead to, and how long a check may take.
        note: is told of every decision, with its verdicts, the characters checked and the seconds it took.
    """

    def __init__(self, classify: Classify, policy: Policy, note: Note) -> None:
        self._classify = classify
        self._policy = policy
        self._note = note
        self._seconds = policy.check_deadline_ms / 1000

    async def decide(self, items: Sequence[ClassifyItem], direction: Direction) -> Decision:
        """Classify and decide; no verdict is an error, never an allowance."""
        if not items:  # white space only: there is nothing to judge
            return Decision(Action.ALLOW, direction)
        with span("check", {"fedward.direction": direction.value}) as traced:
            decision = await self._decide(items, direction)
            traced.note({"fedward.action": decision.action.value, "fedward.categories": decision.categories})
        return decision

    async def _decide(self, items: Sequence[ClassifyItem], direction: Direction) -> Decision:
        started = time.perf_counter()
        try:
            verdicts = await self._classify(items, direction, self._seconds)
            decision = decide(verdicts, direction, self._policy)
        except FedwardError as error:
            DECISIONS.labels(direction.value, "unavailable").inc()
            get_logger().warning("check failed", direction=direction.value, error=error.message)
            raise
        count(decision)
        self._note(decision, verdicts, sum(map(_characters, items)), time.perf_counter() - started)
        if not decision.allowed or decision.shadowed:
            get_logger().info(
                "found unsafe", direction=direction.value, categories=decision.categories, action=decision.action.value
            )
        return decision


def _characters(item: ClassifyItem) -> int:
    return len(item.prompt or "" if item.response is None else item.response)
