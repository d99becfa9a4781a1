"""A streamed answer on its way through: cut into units, each checked as it arrives, handed out in order.

Reading, checking and sending overlap: unit k is checked while unit k+1 arrives. A unit ends at the end of a
sentence, at a length, or at a pause, and where possible never inside a word, so that a word is judged whole.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Self

from gateway.answers import Head
from gateway.chat import has_words
from gateway.policy import Decision
from gateway.settings import GatewaySettings
from services.contracts.chat import ChatChunk, Usage
from services.contracts.errors import UpstreamUnavailable

Check = Callable[[str], Awaitable[Decision]]

# A full stop only counts with white space after it (3.14, example.org); full-width ones need none.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|\n+|[。！？]")


class Segmenter:
    """Cuts text that arrives in pieces into units. The units, joined, are the text."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = ""

    def feed(self, text: str) -> list[str]:
        """Take a piece; hand out the units that are complete."""
        self._held += text
        units = []
        while True:
            end = _SENTENCE_END.search(self._held)
            if end and end.end() <= self._limit:
                units.append(self._cut(end.end()))
            elif len(self._held) > self._limit:
                units.append(self._cut(self._last_space(self._limit) or self._limit))
            else:
                return units

    def pause(self) -> str:
        """What may go when nothing more comes for a while: whole words, or a sentence that is complete."""
        complete = self._held[-1:] in tuple(".!?…")
        return self._cut(len(self._held) if complete else self._last_space(len(self._held)))

    def rest(self) -> str:
        """Everything that is left, at the end of the answer."""
        return self._cut(len(self._held))

    def _cut(self, end: int) -> str:
        unit, self._held = self._held[:end], self._held[end:]
        return unit

    def _last_space(self, end: int) -> int:
        """The position after the last white space before ``end``; 0 when there is none."""
        return next((i for i in range(end, 0, -1) if self._held[i - 1].isspace()), 0)


class CheckedAnswer:
    """One streamed generation, read in its own task from the moment the block is entered.

    Iterate to get each unit with the decision on it. Leaving the block stops the generation and every check.

    Args:
        chunks: the answer as it comes from the inference service.
        check: decides on a text: up to ``context_characters`` of the answer so far, and the unit.
        settings: lengths and limits.
    """

    def __init__(self, chunks: AsyncGenerator[ChatChunk, None], check: Check, settings: GatewaySettings) -> None:
        self.head: Head | None = None
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self._chunks = chunks
        self._check = check
        self._settings = settings
        self._segmenter = Segmenter(settings.unit_characters)
        self._slots = asyncio.Semaphore(settings.checks_in_flight)
        self._units: asyncio.Queue[tuple[str, asyncio.Task[Decision]] | Exception | None] = asyncio.Queue()
        self._checks: set[asyncio.Task[Decision]] = set()
        self._wordless = ""
        self._cut_characters = 0
        self._handed_out = 0
        self._stopped = False
        self._pause: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        self._overdue = asyncio.get_running_loop().call_later(self._settings.generation_seconds, self._on_overdue)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_reading()
        for check in self._checks:
            check.cancel()
        await asyncio.wait([self._reader, *self._checks])  # not gather, which passes cancellations on

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Decision]:
        """The next unit in order; raises what went wrong in reading or in its check, after the units before it."""
        item = await self._units.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        unit, check = item
        decision = await check
        self._handed_out += len(unit)
        return unit, decision

    async def _read(self) -> None:
        """Read to the end of the answer; the queue then ends with None, or with what went wrong."""
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    self._take(chunk)
            if self.finish_reason is None:
                raise UpstreamUnavailable("inference", "the stream broke off before the answer was finished")
            self._start_check(self._segmenter.rest(), last=True)
            self._units.put_nowait(None)
        except Exception as error:  # whatever it is, the consumer has to learn of it or it would wait for ever
            self._units.put_nowait(error)
        finally:
            self._overdue.cancel()
            self._stop_waiting()

    def _on_overdue(self) -> None:
        seconds = self._settings.generation_seconds
        self._units.put_nowait(UpstreamUnavailable("inference", f"the answer was not finished in {seconds:g} s"))
        self._stop_reading()

    def _stop_reading(self) -> None:
        """Cancel the reader, but only once: httpx cancelled again while it closes a connection leaves it open."""
        if not self._stopped:
            self._stopped = True
            self._reader.cancel()

    def _take(self, chunk: ChatChunk) -> None:
        self.head = self.head or Head.of(chunk)
        self.usage = chunk.usage or self.usage
        if len(chunk.choices) > 1 or any(choice.index != 0 for choice in chunk.choices):
            raise UpstreamUnavailable("inference", "sent more than one answer where one was asked for")
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta.content:
                self._take_text(choice.delta.content)

    def _take_text(self, text: str) -> None:
        self.text += text
        if len(self.text) - self._handed_out > self._settings.held_limit_characters:
            limit = self._settings.held_limit_characters
            raise UpstreamUnavailable("safety", f"more than {limit} characters of the answer wait for their verdict")
        for unit in self._segmenter.feed(text):
            self._start_check(unit)
        self._stop_waiting()
        self._pause = asyncio.get_running_loop().call_later(self._settings.unit_idle_ms / 1000, self._on_pause)

    def _on_pause(self) -> None:
        self._start_check(self._segmenter.pause())

    def _stop_waiting(self) -> None:
        if self._pause is not None:
            self._pause.cancel()

    def _start_check(self, unit: str, *, last: bool = False) -> None:
        """Start the check of a unit. Text before the first word waits for it: alone it has no verdict."""
        unit, self._wordless = self._wordless + unit, ""
        if not self._cut_characters and not last and not has_words(unit):
            self._wordless = unit
        elif unit:
            start = max(0, self._cut_characters - self._settings.context_characters)
            self._cut_characters += len(unit)
            task = asyncio.create_task(self._in_turn(self.text[start : self._cut_characters]))
            self._checks.add(task)
            task.add_done_callback(self._check_done)
            self._units.put_nowait((unit, task))

    def _check_done(self, task: asyncio.Task[Decision]) -> None:
        """Look at the outcome: nobody else does when the answer ends before the unit's turn, and asyncio complains."""
        self._checks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _in_turn(self, text: str) -> Decision:
        async with self._slots:
            return await self._check(text)
