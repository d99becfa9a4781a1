"""The shipped calibration and the validation figures, all on texts that training did not see."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifyItem
from services.safety.calibration import Calibration, OperatingPoint
from services.safety.embedded.classifier import EmbeddedClassifier, refuses, score_texts
from services.safety.embedded.scores import Scorer
from services.safety.items import read_item
from services.safety.training.answers import Answer, answers_to, instruction_answers
from services.safety.training.calibrate import calibrate
from services.safety.training.fitting import share_at_least, threshold_at
from services.safety.training.labelled import Labelled
from services.safety.training.rows import Row

REFUSAL_THRESHOLD = 0.5
# The content head's share of the false positives of a pair: prompt and content share the 2 % of the operating point.
CONTENT_FALSE_POSITIVES = 0.01
DATA = "Self-Instruct (harmless) and the harmful tenth that training did not see"


def content_shift(scorer: Scorer, data: Path) -> float:
    """What the content head's logits lack, so that on Self-Instruct it reaches the prompt head's threshold as often."""
    pairs = list(instruction_answers(data))
    asked = [scores.asks for scores in score_texts(scorer, [prompt for prompt, _ in pairs])]
    said = [max(scores.opening, scores.later) for scores in score_texts(scorer, [answer.text for _, answer in pairs])]
    return _logit(threshold_at(asked, CONTENT_FALSE_POSITIVES)) - _logit(threshold_at(said, CONTENT_FALSE_POSITIVES))


def shipped_calibration(scorer: Scorer, data: Path, unseen_rows: Sequence[Row]) -> Calibration:
    """Thresholds at which 2 % (balanced) or 8 % (strict) of Self-Instruct, as prompts and as pairs, is flagged."""
    pairs = [(prompt, answer.text) for prompt, answer in instruction_answers(data)]
    harmful = [row for row in unseen_rows if row.unsafe]
    complied = [(row.text, answer.text) for row in harmful for answer in answers_to([row])]
    items = [
        *(Labelled(ClassifyItem(prompt=prompt), unsafe=False) for prompt, _ in pairs),
        *(Labelled(ClassifyItem(prompt=row.text), unsafe=True, category=row.category) for row in harmful),
        *(Labelled(ClassifyItem(prompt=p, response=r), unsafe=False) for p, r in pairs),
        *(Labelled(ClassifyItem(prompt=p, response=r), unsafe=True) for p, r in complied),
    ]
    start = uncalibrated(scorer)
    raw = EmbeddedClassifier(scorer, start)
    verdicts = raw.classify_all([read_item(item.item) for item in items])
    digest = hashlib.sha256("\0".join(item.item.model_dump_json() for item in items).encode("utf-8", "replace"))
    return calibrate(
        items, verdicts, raw.info(), data=DATA, data_sha256=digest.hexdigest(), current=uncalibrated(scorer)
    )


def uncalibrated(scorer: Scorer) -> Calibration:
    """Thresholds of one half, for a model of which nothing is known yet."""
    half = OperatingPoint(prompt_threshold=0.5, response_threshold=0.5, refusal_threshold=REFUSAL_THRESHOLD)
    return Calibration.unmeasured(scorer.model_id, scorer.sha256, half)


def validate(
    scorer: Scorer, point: OperatingPoint, unseen_rows: Sequence[Row], unseen_answers: Sequence[Answer]
) -> dict[str, float]:
    """Shares at the thresholds by source, refusals found, and the mean average precision of the categories."""
    figures: dict[str, float] = {}
    scores = [scores.asks for scores in score_texts(scorer, [row.text for row in unseen_rows])]
    for source in sorted({row.source for row in unseen_rows}):
        for unsafe, name in ((True, "recall"), (False, "false_positives")):
            chosen = [
                score
                for row, score in zip(unseen_rows, scores, strict=True)
                if row.source == source and row.unsafe is unsafe
            ]
            if chosen:
                figures[f"prompt.{name}.{source}"] = share_at_least(chosen, point.prompt_threshold)
    judged = [answer for answer in unseen_answers if answer.source != "hh_rlhf"]  # its labels are a phrase list's
    found = refuses(scorer, [answer.text for answer in judged], point.refusal_threshold)
    for refused, name in ((True, "recall"), (False, "false_positives")):
        figures[f"refusal.{name}"] = _share(
            flag for answer, flag in zip(judged, found, strict=True) if answer.refused is refused
        )
    figures["categories.macro_average_precision"] = category_precision(scorer, unseen_rows)
    return figures


def category_precision(scorer: Scorer, rows: Sequence[Row]) -> float:
    """Mean over the categories of the average precision on AILuminate's unseen rows, each against all others."""
    hazards = [row for row in rows if row.source == "ailuminate"]
    table = np.array([scores.categories for scores in score_texts(scorer, [row.text for row in hazards])])
    labels = {name: [row.category is HazardCategory(name) for row in hazards] for name in scorer.categories}
    return float(
        np.mean(
            [
                average_precision_score(label, table[:, scorer.categories.index(name)])
                for name, label in labels.items()
                if any(label)
            ]
        )
    )


def _share(flags: Iterable[bool]) -> float:
    return float(np.mean(list(flags)))


def _logit(probability: float) -> float:
    return float(np.log(probability / (1.0 - probability)))
