"""The rows that the safety model is trained and measured on, and how they are split."""

import hashlib
from dataclasses import dataclass

from services.contracts.hazards import HazardCategory


@dataclass(frozen=True)
class Row:
    """One labelled text.

    Args:
        text: the text itself: a prompt, or a response.
        unsafe: whether it asks for harm (a prompt) or is harmful (a response).
        source: the data set, or the word list, that it comes from.
        weight: how much it counts in training.
        category: its hazard category, where the source names one.
        group: rows of one group never stand on both sides of a split; the text itself by default.
    """

    text: str
    unsafe: bool
    source: str
    weight: float = 1.0
    category: HazardCategory | None = None
    group: str = ""

    @property
    def key(self) -> str:
        """What a split goes by: the group, or the text itself."""
        return self.group or self.text


def is_held_out(key: str, percent: int) -> bool:
    """Whether a hash of the key puts it among the ``percent`` that training does not see."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    return int(digest[:8], 16) % 100 < percent
