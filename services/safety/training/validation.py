"""Thresholds and figures on rows that the first training pass did not see."""

from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifyItem, Outcome
from services.safety.classifier import SafetyModel
from services.safety.training.answers import Answer, answers_to, instruction_answers
from services.safety.training.fitting import share_at_least, threshold_at
from services.safety.training.heads import Calibration, Heads
from services.safety.training.rows import Row

FALSE_POSITIVES = 0.02
CONTENT_FALSE_POSITIVES = 0.01  # of the content head alone: prompt and content share the 2 % of a pair
REFUSAL_FALSE_POSITIVES = 0.01


def calibrate(heads: Heads, data: Path, unseen_answers: list[Answer]) -> Calibration:
    """Choose the thresholds on Self-Instruct, and the refusal threshold on unseen answers."""
    pairs = list(instruction_answers(data))
    raw = heads.model(Calibration(0.5, 0.5, 0.5, 0.0))
    prompt_scores = [raw.prompt_score(prompt) for prompt, _ in pairs]
    content_scores = [raw.content_score(answer.text) for _, answer in pairs]
    shift = _logit(threshold_at(prompt_scores, CONTENT_FALSE_POSITIVES)) - _logit(
        threshold_at(content_scores, CONTENT_FALSE_POSITIVES)
    )
    ordinary = [raw.refusal_score(answer.text) for answer in unseen_answers if not answer.refused]
    refusal = max(0.5, threshold_at(ordinary, REFUSAL_FALSE_POSITIVES))
    shifted = heads.model(Calibration(0.5, 0.5, refusal, shift))
    pair_scores = [_pair_score(shifted, prompt, answer.text) for prompt, answer in pairs]
    return Calibration(
        prompt_threshold=threshold_at(prompt_scores, FALSE_POSITIVES),
        response_threshold=threshold_at(pair_scores, FALSE_POSITIVES),
        refusal_threshold=refusal,
        content_shift=shift,
    )


def validate(model: SafetyModel, unseen_rows: list[Row], unseen_answers: list[Answer]) -> dict[str, float]:
    """Shares at the thresholds by source, refusals found, and the mean average precision of the categories."""
    figures = {
        "threshold.prompt": model.prompt_threshold,
        "threshold.response": model.response_threshold,
    }
    for source in sorted({row.source for row in unseen_rows}):
        for unsafe, name in ((True, "recall"), (False, "false_positives")):
            scores = [model.prompt_score(r.text) for r in unseen_rows if r.source == source and r.unsafe is unsafe]
            if scores:
                figures[f"prompt.{name}.{source}"] = share_at_least(scores, model.prompt_threshold)
    for refused, name in ((True, "recall"), (False, "false_positives")):
        found = [model.refuses(a.text) for a in unseen_answers if a.refused is refused and a.source != "hh_rlhf"]
        figures[f"refusal.{name}"] = float(np.mean(found))
    complied = [(r, a) for r in unseen_rows for a in answers_to([r]) if r.unsafe]
    flagged = [_unsafe(model, row.text, answer.text) for row, answer in complied]
    figures["response.recall.affirmative"] = float(np.mean(flagged))
    figures["categories.macro_average_precision"] = category_precision(model, unseen_rows)
    return figures


def category_precision(model: SafetyModel, rows: list[Row]) -> float:
    """Mean over the categories of the average precision on AILuminate's unseen rows, each against all others."""
    hazards = [row for row in rows if row.source == "ailuminate"]
    scores = [model.category_scores(row.text) for row in hazards]
    return float(
        np.mean(
            [
                average_precision_score(
                    [row.category is HazardCategory(category) for row in hazards], [s[category] for s in scores]
                )
                for category in model.category_ids
            ]
        )
    )


def _pair_score(model: SafetyModel, prompt: str, response: str) -> float:
    return model.classify(ClassifyItem(prompt=prompt, response=response)).score or 0.0


def _unsafe(model: SafetyModel, prompt: str, response: str) -> bool:
    return model.classify(ClassifyItem(prompt=prompt, response=response)).outcome is Outcome.UNSAFE


def _logit(probability: float) -> float:
    return float(np.log(probability / (1.0 - probability)))
