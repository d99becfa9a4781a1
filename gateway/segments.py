"""Cutting a streamed text into units that are checked and released one by one.

A unit ends at the end of a sentence, at a length, or at a pause, and where possible never inside a word, so that a
word is judged whole.
"""

import re
from collections import deque
from typing import NamedTuple

from gateway.answers import Part, Token, token_texts
from gateway.asked import has_words
from gateway.policy import StreamPolicy, StreamUnit

# A full stop only counts with white space after it (3.14, example.org); full-width ones need none.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|\n+|[。！？]")


class Segmenter:
    """Cuts text that arrives in pieces into units. The units, joined, are the text."""

    def __init__(self, limit: int, *, at_sentences: bool = True) -> None:
        self._limit = limit
        self._at_sentences = at_sentences
        self._held = ""

    def feed(self, text: str) -> list[str]:
        """Take a piece; hand out the units that are complete."""
        self._held += text
        units, start = [], 0
        while end := self._end_of_unit(start):
            units.append(self._held[start:end])
            start = end
        self._held = self._held[start:]
        return units

    def _end_of_unit(self, start: int) -> int:
        """Where the unit that begins at ``start`` ends; 0 when that has not come. Looks no further than that."""
        limit = start + self._limit
        found = _SENTENCE_END.search(self._held, start, limit + 1) if self._at_sentences else None
        if found and found.end() <= limit:
            return found.end()
        if len(self._held) > limit:
            return self._last_space(start, limit) or limit
        return 0

    def pause(self) -> str:
        """What may go when nothing more comes for a while: whole words, or a sentence that is complete."""
        complete = self._held[-1:] in tuple(".!?…")
        return self._cut(len(self._held) if complete else self._last_space(0, len(self._held)))

    def rest(self) -> str:
        """Everything that is left, at the end of the answer."""
        return self._cut(len(self._held))

    def _cut(self, end: int) -> str:
        unit, self._held = self._held[:end], self._held[end:]
        return unit

    def _last_space(self, start: int, end: int) -> int:
        """The end of the last white space between the two, or 0: where a cut separates two words."""
        for i in range(end, start, -1):
            if self._held[i - 1].isspace():
                return i
        return 0


def segmenter_of(stream: StreamPolicy) -> Segmenter:
    """How a policy cuts; an answer that leaves as a whole is cut at sentences, where it has to be."""
    return Segmenter(stream.max_characters, at_sentences=stream.unit is not StreamUnit.CHARACTERS)


def pieces_of(text: str, stream: StreamPolicy) -> list[str]:
    """A text cut into units; joined they are the text."""
    segmenter = segmenter_of(stream)
    return [piece for piece in (*segmenter.feed(text), segmenter.rest()) if piece]


class Cut(NamedTuple):
    """A part to release when ``texts`` are allowed: they are the part's own and a bounded stretch before it."""

    part: Part
    texts: list[str]


class Channel:
    """One channel of one choice: its text, and what is told about its tokens, on the way to be cut.

    Args:
        index: the choice.
        name: the channel.
        stream: where units end.
        context_characters: how much text before a unit is checked along with it.
    """

    def __init__(self, index: int, name: str, *, stream: StreamPolicy, context_characters: int) -> None:
        self.text = ""
        self._index = index
        self._name = name
        self._context_characters = context_characters
        self._whole = stream.unit is StreamUnit.ANSWER
        self._segmenter = segmenter_of(stream)
        self._cut_characters = 0
        self._wordless = ""
        self._last = ""
        # Tokens with the length of the text at their end: such that have not left yet, and such that are context.
        self._tokens: deque[tuple[int, Token]] = deque()
        self._context: deque[tuple[int, Token]] = deque()

    def feed(self, part: Part) -> list[Cut]:
        """Take the next piece; hand out the units that it completes."""
        if self._whole:
            self.hold(part)
            return []
        self._note(part)
        return [cut for text in self._segmenter.feed(part.text) if (cut := self._unit(text))]

    def pause(self) -> list[Cut]:
        """The unit that may go when nothing more comes for a while."""
        cut = self._unit(self._segmenter.pause())
        return [cut] if cut else []

    def hold(self, part: Part) -> None:
        """Take the last piece, which came along with the end of the choice: it leaves with it."""
        self._note(part)
        self._last += part.text

    def end(self) -> Cut:
        """All that has not been handed out, with all text of the channel."""
        text = self._wordless + self._segmenter.rest() + self._last
        tokens = tuple(token for _, token in self._tokens)
        before = [token for _, token in self._context]
        part = Part(self._index, self._name, text, tokens)
        return Cut(part, [self.text, *token_texts([*before, *tokens], self.text)])

    def _note(self, part: Part) -> None:
        self.text += part.text
        self._tokens.extend((len(self.text), token) for token in part.tokens)

    def _unit(self, text: str) -> Cut | None:
        """The next unit. Text before the first word waits for it: alone it has no verdict."""
        text, self._wordless = self._wordless + text, ""
        if not self._cut_characters and not has_words(text):
            self._wordless = text
            return None
        if not text:
            return None
        start = max(0, self._cut_characters - self._context_characters)
        self._cut_characters += len(text)
        leaving = []
        while self._tokens and self._tokens[0][0] <= self._cut_characters:
            leaving.append(self._tokens.popleft())
        while self._context and self._context[0][0] <= start:
            self._context.popleft()
        self._context.extend(leaving)
        part = Part(self._index, self._name, text, tuple(token for _, token in leaving))
        seen = self.text[start : self._cut_characters]
        return Cut(part, [seen, *token_texts((token for _, token in self._context), seen)])
