"""From the scores of windows to a verdict on a conversation.

Both tiers give the same columns for every window of a text: P(asks for harm), P(harmful in itself), P(declines), and
one score per hazard category. How a response is judged::

    opening = max(P(prompt asks for harm), P(opening harmful)) x (1 - P(declines) if it declines else 1)
    score   = max(opening, P(harmful) of every later window)

So a refusal of an unsafe prompt is safe, an answer that complies with one is unsafe whatever it says, and harm
further down in a long answer counts even after a polite opening.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from services.contracts.verdicts import Outcome, Verdict
from services.safety.calibration import OperatingPoint
from services.safety.embedded.refusal import has_refusal_phrase

HEADS = ("prompt", "content", "refusal")  # the first columns; the hazard categories follow
PHRASE_PRECISION = 0.95  # of refusal phrases, on public answers: such lists measure .95 to .97

Floats = npt.NDArray[np.float32]
Window = Sequence[Any]  # words or tokens


class Scorer(Protocol):
    """One tier of the embedded classifier. Stateless after construction: one object may serve many threads."""

    tier: str
    model_id: str
    sha256: str
    categories: tuple[str, ...]  # hazard ids, in the order of the columns

    def windows(self, text: str) -> list[Window]:
        """Overlapping pieces that cover the whole text; none for a text without words."""
        ...

    def run(self, windows: Sequence[Window]) -> Floats:
        """Probabilities (n, 3 + C) of n windows: `HEADS`, then the categories."""
        ...


class TextScores(NamedTuple):
    """What the windows of one text say together.

    Args:
        asks: the highest P(asks for harm) of any window.
        opening: P(harmful in itself) of the first window.
        later: the highest P(harmful in itself) of the other windows.
        declines: P(declines) of the first window.
        categories: the highest score of each category (C,).
    """

    asks: float
    opening: float
    later: float
    declines: float
    categories: Floats


def sigmoid(logits: Floats) -> Floats:
    """Logits as probabilities, without overflow."""
    halves: Floats = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return halves


def text_scores(windows: Floats) -> TextScores:
    """Scores of one text from those of its windows (n, 3 + C); a text without windows asks for and says nothing."""
    if not len(windows):
        return TextScores(0.0, 0.0, 0.0, 0.0, np.zeros(windows.shape[1] - len(HEADS), np.float32))
    asks, content, declines = (windows[:, column] for column in range(len(HEADS)))
    return TextScores(
        float(asks.max()),
        float(content[0]),
        float(content[1:].max(initial=0.0)),
        float(declines[0]),
        windows[:, len(HEADS) :].max(axis=0),
    )


def strongest(readings: Sequence[TextScores]) -> TextScores:
    """Several readings of one text as one: the highest of each score; only the first, the plain one, may decline."""
    return TextScores(
        max(reading.asks for reading in readings),
        max(reading.opening for reading in readings),
        max(reading.later for reading in readings),
        readings[0].declines,
        np.max([reading.categories for reading in readings], axis=0),
    )


def declines(response: str, scores: TextScores, threshold: float) -> float | None:
    """How sure it is that the response declines, by a phrase or by the learned head; None when it does not."""
    if has_refusal_phrase(response):
        return max(scores.declines, PHRASE_PRECISION)
    return scores.declines if scores.declines >= threshold else None


def judge(
    prompts: Sequence[TextScores], response: tuple[str, TextScores] | None, point: OperatingPoint, scorer: Scorer
) -> Verdict:
    """The verdict on a conversation at an operating point.

    Args:
        prompts: the scores of every user turn, at least one.
        response: the answer with its scores, when an answer is to be judged.
        point: the thresholds.
        scorer: where the scores come from.
    """
    score = max(prompt.asks for prompt in prompts)
    threshold, refused = point.prompt_threshold, None
    categories = np.max([prompt.categories for prompt in prompts], axis=0)
    if response is not None:
        text, scores = response
        certainty = declines(text, scores, point.refusal_threshold)
        score = max(score, scores.opening) * (1.0 - (certainty or 0.0))
        score = max(score, scores.later)
        threshold, refused = point.response_threshold, certainty is not None
        categories = np.maximum(categories, scores.categories)
    return Verdict(
        outcome=Outcome.UNSAFE if score >= threshold else Outcome.SAFE,
        score=score,
        threshold=threshold,
        categories=dict(zip(scorer.categories, map(float, categories), strict=True)),
        refused=refused,
        model_id=scorer.model_id,
    )
