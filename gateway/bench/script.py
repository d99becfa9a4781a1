"""What the mock services are told to do, and the words that the mock model says.

The marker is a harmless word that the mock classifier, and nobody else, calls unsafe.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

MARKER = "xylophonist"
MODEL = "bench"
SENTENCE_WORDS = 17  # about what an English sentence has
MID_STREAM_WORDS = 10  # a fault of the model in a stream shows after this many words

Fault = Literal["", "down", "500", "hang", "garbage", "drip", "reset"]
Field = Literal["content", "reasoning_content", "tool_calls"]


class Script(BaseModel):
    """Body of ``POST /script``: how both mock services behave until the next one.

    ``marker_at`` is the index of the word that the marker replaces; ``marker_field`` where in the message it stands.
    ``fault_after`` is how many checks are answered properly before the classifier's fault shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: int = 50
    word_seconds: float = 0.0
    sentences: bool = True
    marker_at: int | None = None
    marker_split: bool = False
    marker_field: Field = "content"
    check_seconds: float = 0.001
    upstream_fault: Fault = ""
    classifier_fault: Fault = ""
    fault_after: int = 0

    def said(self) -> list[str]:
        """The words of the answer, each with the space after it."""
        words = [f"word{i}" for i in range(self.words)]
        if self.marker_at is not None:
            words[self.marker_at] = MARKER
        ends = range(SENTENCE_WORDS - 1, self.words, SENTENCE_WORDS) if self.sentences else ()
        return [f"{word}." if i in ends else word for i, word in enumerate(words)]

    def pieces(self) -> Iterator[tuple[Field, str]]:
        """The answer as it is streamed: field and text of every delta."""
        for i, word in enumerate(self.said()):
            field = self.marker_field if i == self.marker_at else "content"
            if i == self.marker_at and self.marker_split:
                middle = len(MARKER) // 2
                yield field, word[:middle]
                yield field, f"{word[middle:]} "
            else:
                yield field, f"{word} "

    def text(self) -> str:
        """All text of the answer, whatever field it stands in, in order."""
        return "".join(text for _, text in self.pieces())


class Counters(BaseModel):
    """Answer of ``GET /script``: what happened since the script was set."""

    model_config = ConfigDict(extra="forbid")

    generations: int = 0
    generations_open: int = 0
    checks: int = 0
    check_bytes: int = 0
