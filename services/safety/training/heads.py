"""The heads of one training pass, and how they become the weights that are served."""

from typing import NamedTuple

import numpy as np

from services.contracts.hazards import HazardCategory
from services.safety.classifier import MODEL_ID, SafetyModel
from services.safety.training.answers import Answer
from services.safety.training.fitting import Head, Sample
from services.safety.training.rows import Row
from services.safety.training.sources import AILUMINATE
from services.safety.weights import Array, Manifest, WeightsFile

PHRASE_PRECISION = 0.95  # of refusal phrases: the study measured .95 to .97 for such lists
# The categories of which the permissive data has rows. S6, S13 and S14 have none worth a score.
CATEGORIES = sorted(set(AILUMINATE.values()), key=lambda category: int(category.value[1:]))


class Calibration(NamedTuple):
    """What is chosen on data that the first pass did not see."""

    prompt_threshold: float
    response_threshold: float
    refusal_threshold: float
    content_shift: float  # added to the content head's logits, so that one threshold fits both heads of a pair


class Heads(NamedTuple):
    """The heads of one pass."""

    prompt: Head
    content: Head
    refusal: Head
    categories: dict[HazardCategory, Head]

    @classmethod
    def fit(cls, rows: list[Row], answers: list[Answer]) -> "Heads":
        """Fit every head. Rows without a category teach the category heads only when they are safe."""
        prompts = Sample(rows)
        responses = Sample([answer.content_row() for answer in answers])
        known = Sample([row for row in rows if row.category or not row.unsafe])
        return cls(
            prompts.fit("prompt", [row.unsafe for row in rows]),
            responses.fit("content", [answer.unsafe for answer in answers]),
            responses.fit("refusal", [answer.refused for answer in answers]),
            {
                category: known.fit("categories", [r.category is category for r in known.rows])
                for category in CATEGORIES
            },
        )

    def tensors(self) -> dict[str, Array]:
        """The weights by name."""
        return {
            "prompt": self.prompt.weights,
            "content": self.content.weights,
            "refusal": self.refusal.weights,
            "categories": np.stack([head.weights for head in self.categories.values()]),
        }

    def metadata(self, calibration: Calibration) -> dict[str, str]:
        """Biases and thresholds: hashed with the weights, since a verdict hangs on them as much."""
        return {
            "categories": ",".join(category.value for category in self.categories),
            "prompt_bias": repr(self.prompt.bias),
            "content_bias": repr(self.content.bias + calibration.content_shift),
            "refusal_bias": repr(self.refusal.bias),
            "categories_bias": ",".join(repr(head.bias) for head in self.categories.values()),
            "prompt_threshold": repr(calibration.prompt_threshold),
            "response_threshold": repr(calibration.response_threshold),
            "refusal_threshold": repr(calibration.refusal_threshold),
            "phrase_precision": repr(PHRASE_PRECISION),
        }

    def model(self, calibration: Calibration) -> SafetyModel:
        """The heads as the model that would be served."""
        manifest = Manifest(model_id=MODEL_ID, sha256="0" * 64)
        return SafetyModel(WeightsFile(self.tensors(), self.metadata(calibration), manifest))
