"""Training the n-gram tier: one linear head after the other, and how they become the weights that are served."""

from typing import NamedTuple

import numpy as np

from services.contracts.hazards import HazardCategory
from services.safety.embedded.ngram import MODEL_ID, NgramScorer
from services.safety.embedded.weights import Array, Manifest, WeightsFile
from services.safety.training.answers import Answer
from services.safety.training.fitting import Head, WindowTable
from services.safety.training.rows import Row

LEAST_ROWS = 50  # a category with fewer gets no score: it would be noise


class Heads(NamedTuple):
    """The fitted heads."""

    prompt: Head
    content: Head
    refusal: Head
    categories: dict[HazardCategory, Head]

    @classmethod
    def fit(cls, rows: list[Row], answers: list[Answer]) -> "Heads":
        """Fit every head. Rows without a category teach the category heads only when they are safe."""
        prompts = WindowTable(rows)
        responses = WindowTable([answer.content_row() for answer in answers])
        known = WindowTable([row for row in rows if row.category or not row.unsafe])
        labels = {category: [row.category is category for row in known.rows] for category in HazardCategory}
        return cls(
            prompts.fit("prompt", [row.unsafe for row in rows]),
            responses.fit("content", [answer.unsafe for answer in answers]),
            responses.fit("refusal", [answer.refused for answer in answers]),
            {
                category: known.fit("categories", label)
                for category, label in labels.items()
                if sum(label) >= LEAST_ROWS
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

    def metadata(self, content_shift: float) -> dict[str, str]:
        """The biases, hashed with the weights since a verdict hangs on them as much.

        Args:
            content_shift: added to the content head's logits, so that one threshold fits both heads of a pair.
        """
        return {
            "categories": ",".join(category.value for category in self.categories),
            "prompt_bias": repr(self.prompt.bias),
            "content_bias": repr(self.content.bias + content_shift),
            "refusal_bias": repr(self.refusal.bias),
            "categories_bias": ",".join(repr(head.bias) for head in self.categories.values()),
        }

    def scorer(self, content_shift: float = 0.0) -> NgramScorer:
        """The heads as the tier that would be served."""
        manifest = Manifest(model_id=MODEL_ID, sha256="0" * 64)
        return NgramScorer(WeightsFile(self.tensors(), self.metadata(content_shift), manifest))
