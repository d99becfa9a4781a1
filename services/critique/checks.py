"""Whether a revision is fit to be trained on or served: pure functions of the texts."""

import re
from itertools import pairwise

from services.critique.backend import Ending

# A label that a model likes to put before its revision.
_LABEL = re.compile(r"^(revision|revised answer|answer)\s*:\s*", re.IGNORECASE)
# Chat markers of common templates, and the labels of our own prompts at the beginning of a line.
_MARKERS = re.compile(
    r"<\|[^|<>]*\|>|</?s>|<pad>|\[/?INST\]|<(start|end)_of_turn>"
    r"|^\s*(prompt|answer|answer [ab]|critique|critique request|revision request|question|human|user|assistant)\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_FEWEST_WORDS = 3
_LEAST_DISTINCT = 0.6


def tidy(text: str) -> str:
    """The text without surrounding space and without one leading label such as ``Revision:``."""
    return _LABEL.sub("", text.strip()).strip()


def why_rejected(revision: str, draft: str, ending: Ending) -> str | None:
    """The first check that a revision fails, in words; None when it passes all."""
    if ending == "too_long":
        return "prompt, draft and critique do not fit the model's context"
    if ending == "cut_off":
        return "cut off at the limit of tokens"
    if not revision:
        return "empty"
    if _plain(revision) == _plain(draft):
        return "the same as the draft"
    marker = _MARKERS.search(revision)
    if marker:
        return f"contains the role marker {marker[0].strip()!r}"
    return "degenerate: repeats itself or has too few words" if _degenerate(revision) else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _degenerate(text: str) -> bool:
    """Fewer than 3 words, or under 60 % distinct pairs of neighbouring words: the rule of our evaluation."""
    words = re.findall(r"\w+", text.lower())
    pairs = list(pairwise(words))
    return len(words) < _FEWEST_WORDS or len(set(pairs)) < _LEAST_DISTINCT * len(pairs)
