"""From token ids to text that may be sent: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

# What decoding puts for bytes that are not (yet) a whole UTF-8 character.
INCOMPLETE = "\ufffd"
CONTEXT_IDS = 5  # of what a text continues, enough to decode its first token as in the middle of a text


class Detokenizer:
    """Decodes an answer token by token.

    The pieces' concatenation is the text of all ids decoded at once. A character is given out when its last byte
    has come. Only the newest tokens are decoded again, in front of those a few known ones, because a tokenizer may
    write a token differently at the beginning of a text (the way of text-generation-inference).
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        """``before``: the ids that the text continues; they are not given out."""
        self._decode = decode
        self._ids: list[int] = list(before[-CONTEXT_IDS:])
        self._context = 0  # where the re-decoded window begins
        self._given = len(self._ids)  # ids before this one have been given out

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left when no more tokens come: bytes that never became a character, as U+FFFD."""
        text = self._new_text()
        self._context, self._given = self._given, len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(known) :]


class StopScanner:
    """Finds the first stop string in a growing text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """``keep`` leaves the stop string at the end of the text, as TGI does; OpenAI's protocol cuts it off."""
        self._stops = [stop for stop in stops if stop]
        self._keep = keep
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that may be sent now; sets ``found`` when a stop string is complete."""
        self._held += text
        ends = [(self._held.find(stop), len(stop)) for stop in self._stops if stop in self._held]
        if ends:
            start, length = min(ends)
            self.found = True
            return self._release(start + length if self._keep else start, drop_rest=True)
        return self._release(len(self._held) - self._overlap())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, count: int, *, drop_rest: bool = False) -> str:
        released, rest = self._held[:count], self._held[count:]
        self._held = "" if drop_rest else rest
        return released

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
