"""A streamed answer on its way through: cut into units, each checked as it arrives, handed out in order.

Reading, checking and sending overlap: unit k is checked while unit k+1 arrives. Each choice has its own channels
(content, reasoning, refusal), each cut by itself. Calls are held until the choice has ended. What has not left by
then leaves after one check of all that the choice says.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from gateway.answers import Call, Event, Finish, Head, Part, Unit, texts_to_check
from gateway.policy import Decision, StreamPolicy
from gateway.segments import Channel
from gateway.settings import GatewaySettings
from services.common.garbage import forget_frames
from services.contracts.chat import Usage
from services.contracts.errors import UpstreamUnavailable

Check = Callable[[int, list[str]], Coroutine[Any, Any, Decision]]


class _Choice:
    """What has come of one choice."""

    def __init__(self, index: int, stream: StreamPolicy, context_characters: int) -> None:
        self._index = index
        self._stream = stream
        self._context_characters = context_characters
        self.channels: dict[str, Channel] = {}
        self._calls: dict[tuple[str, int | None], Call] = {}
        self._pause: tuple[str, asyncio.TimerHandle] | None = None  # the channel that last got text

    def channel(self, name: str) -> Channel:
        """One channel; a new one when nothing has come in it yet."""
        if name not in self.channels:
            self.channels[name] = Channel(
                self._index, name, stream=self._stream, context_characters=self._context_characters
            )
        return self.channels[name]

    def add_call(self, channel: str, call: Call) -> None:
        """Take a piece of a call."""
        key = (channel, call.position)
        self._calls[key] = self._calls[key].joined(call) if key in self._calls else call

    def wait_for_pause(self, channel: str, handle: asyncio.TimerHandle) -> None:
        """Note the timer that tells when nothing more comes in ``channel``."""
        self._pause = channel, handle

    def stop_waiting(self) -> str | None:
        """Stop that timer; returns its channel, if there was one."""
        if self._pause is None:
            return None
        (channel, handle), self._pause = self._pause, None
        handle.cancel()
        return channel

    def end(self, last: list[Part], finish: Finish) -> tuple[Unit, list[str]]:
        """The last unit, and all texts of the choice: they are checked as a whole before it leaves."""
        for part in last:
            if part.call:
                self.add_call(part.channel, part.call)
            else:
                self.channel(part.channel).hold(part)
        cuts = [channel.end() for channel in self.channels.values()]
        calls = [Part.of_call(self._index, channel, call) for (channel, _), call in self._calls.items()]
        texts = [text for cut in cuts for text in cut.texts] + list(texts_to_check(calls))
        parts = (*(cut.part for cut in cuts), *calls)
        leaving = tuple(part for part in parts if part.text or part.tokens)
        return Unit(self._index, leaving, finish), texts


class CheckedAnswer:
    """Iterate over it inside ``async with``: each unit comes with the decision on it, in order of arrival.

    Args:
        events: the answer as it comes from upstream.
        check: decides on texts of one choice; called for several units at once.
        stream: how the answer is cut.
        settings: limits.
        choices: how many choices were asked for.

    ``head`` and ``usage`` hold what has come of them, ``held`` how many characters of each choice wait for their
    verdict. Leaving the block cancels reading and checks.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        check: Check,
        stream: StreamPolicy,
        settings: GatewaySettings,
        choices: int,
    ) -> None:
        self.head: Head | None = None
        self.usage: Usage | None = None
        self._events = events
        self._check = check
        self._settings = settings
        self._idle_seconds = stream.idle_ms / 1000
        self._choices = [_Choice(index, stream, settings.context_characters) for index in range(choices)]
        self._open = set(range(choices))  # more may come of these
        self._awaited = set(range(choices))  # the last unit of these has not been handed out
        self._dropped: set[int] = set()
        self.held: Counter[int] = Counter()
        self._units: asyncio.Queue[tuple[Unit, asyncio.Task[Decision]] | Exception | None] = asyncio.Queue()
        self._checks: set[asyncio.Task[Decision]] = set()
        self._stopped = False
        self._over = False

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
        del self._reader  # cancelled, it holds the frame of ``_read``, which holds this object

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Unit, Decision]:
        """The next unit in order; raises what went wrong in reading or in its check, after the units before it."""
        while not self._over:
            item = await self._units.get()
            if item is None:
                break
            if isinstance(item, Exception):
                raise item
            unit, check = item
            if unit.index in self._dropped:
                continue
            decision = await check
            self.held[unit.index] -= sum(map(_size, unit.parts))
            if unit.finish:
                self._awaited.discard(unit.index)
            return unit, decision
        raise StopAsyncIteration

    def drop(self, index: int) -> None:
        """End one choice: what is held of it is gone, and so is what may still come."""
        self._dropped.add(index)
        self._open.discard(index)
        self._awaited.discard(index)
        self.held[index] = 0
        self._choices[index].stop_waiting()
        if not self._awaited:
            self._over, self.usage = True, None  # not all was counted
            self._stop_reading()

    async def _read(self) -> None:
        """Read to the end of the answer; the queue then ends with None, or with what went wrong."""
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    self._take(event)
            if self._open:
                raise UpstreamUnavailable("inference", "the stream broke off before the answer was finished")
            self._units.put_nowait(None)
        except Exception as error:  # whatever it is, the consumer has to learn of it or it would wait for ever
            self._units.put_nowait(error)
        finally:
            self._overdue.cancel()
            for choice in self._choices:
                choice.stop_waiting()

    def _on_overdue(self) -> None:
        seconds = self._settings.generation_seconds
        self._units.put_nowait(UpstreamUnavailable("inference", f"the answer was not finished in {seconds:g} s"))
        self._stop_reading()

    def _stop_reading(self) -> None:
        """Cancel the reader, but only once: a second time would end the closing of its connection."""
        if not self._stopped:
            self._stopped = True
            self._reader.cancel()

    def _take(self, event: Event) -> None:
        self.head = self.head or event.head
        self.usage = event.usage or self.usage
        if any(not 0 <= index < len(self._choices) for index in (*event.finishes, *(p.index for p in event.parts))):
            raise UpstreamUnavailable("inference", "sent more answers than were asked for")
        for part in event.parts:
            if part.index in self._open:
                self._hold(part)
                if part.index not in event.finishes:
                    self._take_part(self._choices[part.index], part)
        for index in self._open.intersection(event.finishes):
            last = [part for part in event.parts if part.index == index]
            self._open.discard(index)
            self._choices[index].stop_waiting()
            self._start_check(*self._choices[index].end(last, event.finishes[index]))

    def _hold(self, part: Part) -> None:
        self.held[part.index] += _size(part)
        limit = self._settings.held_limit_characters
        if self.held.total() > limit:
            raise UpstreamUnavailable("safety", f"more than {limit} characters of the answer wait for their verdict")

    def _take_part(self, choice: _Choice, part: Part) -> None:
        if part.call:
            choice.add_call(part.channel, part.call)
            return
        before = choice.stop_waiting()
        if before is not None and before != part.channel:  # the answer has turned to another channel
            self._on_pause(choice, before)
        for cut in choice.channel(part.channel).feed(part):
            self._start_check(Unit(part.index, (cut.part,)), cut.texts)
        loop = asyncio.get_running_loop()
        handle = loop.call_later(self._idle_seconds, self._on_pause, choice, part.channel)
        choice.wait_for_pause(part.channel, handle)

    def _on_pause(self, choice: _Choice, channel: str) -> None:
        for cut in choice.channel(channel).pause():
            self._start_check(Unit(cut.part.index, (cut.part,)), cut.texts)

    def _start_check(self, unit: Unit, texts: list[str]) -> None:
        task = asyncio.create_task(self._check(unit.index, texts))
        self._checks.add(task)
        task.add_done_callback(self._check_done)
        self._units.put_nowait((unit, task))

    def _check_done(self, task: asyncio.Task[Decision]) -> None:
        """Look at the outcome: nobody else does when the answer ends before the unit's turn, and asyncio complains."""
        self._checks.discard(task)
        if not task.cancelled():
            forget_frames(task.exception())


def _size(part: Part) -> int:
    """Characters that a part holds back."""
    text = len(part.call.name) + len(part.call.arguments) if part.call else len(part.text)
    return text + sum(len(text) for token in part.tokens for text in token.texts)
