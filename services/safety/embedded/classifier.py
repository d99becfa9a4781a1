"""The embedded classifier: reads a prompt, a prompt with its response, or a conversation.

The main path is :meth:`EmbeddedClassifier.classify_all`: every text is undressed of disguises
(:mod:`services.safety.evasion.readings`), every reading is cut into windows, one tier scores all windows, and the
scores of a conversation's texts become its verdict (:mod:`services.safety.embedded.scores`). Nothing is left out: the
highest score counts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from services.contracts.verdicts import ClassifierInfo, Outcome, Verdict
from services.safety.calibration import Calibration, OperatingPoint, PointName
from services.safety.embedded.scores import (
    HEADS,
    Floats,
    Scorer,
    TextScores,
    Window,
    declines,
    judge,
    strongest,
    text_scores,
)
from services.safety.evasion.readings import readings
from services.safety.items import Conversation, why_unreadable

BATCH = 16


class Cut(NamedTuple):
    """One text's readings, each cut into windows."""

    text: str
    readings: list[list[Window]]


class Plan(NamedTuple):
    """Conversations with the windows to score, in order; a conversation that cannot be read has a reason instead."""

    cuts: list[list[Cut] | str]
    has_response: list[bool]

    @property
    def windows(self) -> list[Window]:
        """Every window of every reading of every text."""
        return [window for reading in self.readings() for window in reading]

    def readings(self) -> Iterator[list[Window]]:
        """The windows of each reading of each text that can be read, in order."""
        for cuts in self.cuts:
            for cut in [] if isinstance(cuts, str) else cuts:
                yield from cut.readings


class EmbeddedClassifier:
    """A tier at an operating point. Stateless after construction: one object may serve many threads."""

    def __init__(self, scorer: Scorer, calibration: Calibration, point: PointName = "balanced") -> None:
        self.scorer = scorer
        self.point: OperatingPoint = calibration.points[point]
        self.calibration = calibration
        self._point_name = point

    def info(self) -> ClassifierInfo:
        """What runs, and how well it does."""
        return ClassifierInfo(
            model_id=self.scorer.model_id,
            tier=self.scorer.tier,
            sha256=self.scorer.sha256,
            threshold=self.point.prompt_threshold,
            response_threshold=self.point.response_threshold,
            category_thresholds=self.point.categories,
            operating_point=self._point_name,
            calibration=self.calibration.info(self._point_name),
        )

    def classify_all(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict for each conversation, in order."""
        plan = self.plan(conversations)
        return self.verdicts(plan, score_windows(self.scorer, plan.windows))

    def plan(self, conversations: Sequence[Conversation]) -> Plan:
        """What has to be scored for these conversations."""
        return Plan(
            [self._cut(conversation) for conversation in conversations],
            [conversation.response is not None for conversation in conversations],
        )

    def verdicts(self, plan: Plan, scores: Floats) -> list[Verdict]:
        """The verdicts of a plan from the scores (n, 3 + C) of its windows."""
        rest = iter(np.split(scores, np.cumsum([len(reading) for reading in plan.readings()])))
        found = []
        for cuts, has_response in zip(plan.cuts, plan.has_response, strict=True):
            if isinstance(cuts, str):
                found.append(Verdict(outcome=Outcome.UNSCORED, model_id=self.scorer.model_id, reason=cuts))
                continue
            texts = [strongest([text_scores(next(rest)) for _ in cut.readings]) for cut in cuts]
            response = (cuts[-1].text, texts.pop()) if has_response else None
            found.append(judge(texts, response, self.point, self.scorer))
        return found

    def no_scores(self) -> Floats:
        """The scores (0, 3 + C) of a plan without windows."""
        return np.zeros((0, len(HEADS) + len(self.scorer.categories)), np.float32)

    def _cut(self, conversation: Conversation) -> list[Cut] | str:
        response = conversation.response
        texts = [*conversation.prompts, *([] if response is None else [response])]
        if reason := next(filter(None, map(why_unreadable, texts)), None):
            return reason
        return [Cut(text, [self.scorer.windows(reading) for reading in forms(text)]) for text in texts]


def forms(text: str) -> list[str]:
    """The text as it stands, then what it says without disguises, each once."""
    return list(dict.fromkeys([text, *readings(text)]))


def score_windows(scorer: Scorer, windows: Sequence[Window]) -> Floats:
    """Scores (n, 3 + C) of windows, in batches of like length."""
    order = sorted(range(len(windows)), key=lambda number: len(windows[number]))
    scores = np.zeros((len(windows), len(HEADS) + len(scorer.categories)), np.float32)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        scores[chosen] = scorer.run([windows[number] for number in chosen])
    return scores


def score_texts(scorer: Scorer, texts: Sequence[str]) -> list[TextScores]:
    """Scores of texts as they stand, for training and measuring."""
    cuts = [scorer.windows(text) for text in texts]
    scores = score_windows(scorer, [window for cut in cuts for window in cut])
    return [text_scores(part) for part in np.split(scores, np.cumsum([len(cut) for cut in cuts]))[: len(cuts)]]


def refuses(scorer: Scorer, responses: Sequence[str], threshold: float) -> list[bool]:
    """Which responses decline, by a phrase or by the learned head."""
    scored = zip(responses, score_texts(scorer, responses), strict=True)
    return [declines(text, scores, threshold) is not None for text, scores in scored]
