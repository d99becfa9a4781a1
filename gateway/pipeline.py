"""How a request flows. This is the file to read first.

::

    client --> who asks, quotas --> wire.read --+--> prompt check (safety) ------------+
    (admission)                                 |                                      +--> release, in order
                                                +--> generation (inference) --> answer +    --> record --> client
                                                                                checks (safety)
                                                                                  | unsafe
                                                                                  +--> repair (critique, safety)

The way is the same for all protocols; a ``Wire`` (package ``protocols``) reads requests and writes answers. Generation
starts beside the prompt check, so that an allowed request waits for the slower of the two and not for both; nothing
leaves before the prompt's verdict, and no text leaves before its own. What is unsafe is redacted, revised or refused
(``repair.py``). Whatever fails, fails closed: an error ends the request and what is held is dropped. Every request
leaves a record in the audit, however it ends.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from gateway.admission import Admission
from gateway.answers import BLOCKED, CONTENT, Finish, Head, Part, Sent, Unit, texts_to_check, whole_units
from gateway.asked import Asked
from gateway.checks import Checker, prompt_items, response_items
from gateway.metrics import Ledger
from gateway.policy import Decision, Direction
from gateway.protocols import Wire
from gateway.repair import Repairs
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer
from gateway.upstreams import PassedOn, Upstreams
from gateway.visits import Visit
from services.contracts.chat import Json, Usage
from services.contracts.critique import CritiqueItem, Revision
from services.contracts.errors import Overloaded

Critic = Callable[[CritiqueItem], Awaitable[Revision]]
T = TypeVar("T")
REFUSAL = "I'm sorry, but I can't help with that."
NO_TOKENS = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


class Pipeline:
    """The way of requests through checks and generation."""

    def __init__(self, upstreams: Upstreams, admission: Admission, settings: GatewaySettings) -> None:
        self._upstreams = upstreams
        self._admission = admission
        self._settings = settings
        self._busy = 0

    async def answer(self, raw: Json, wire: Wire, visit: Visit) -> Json:
        """A whole answer, or the refusal in its place; raises a FedwardError when it cannot be made or checked."""
        async with self._at_work(raw, wire, visit) as request:
            asked = request.asked
            async with _beside(self._upstreams.complete(wire, asked)) as generation:
                decision = await request.decide_prompt()
                if not decision.allowed:  # leaving cancels the generation
                    refusals = [instead(index, decision) for index in range(asked.choices)]
                    return wire.whole(asked, Head.own(wire.ID_PREFIX, asked.model), refusals, NO_TOKENS)
                answer = await generation

            units = whole_units(answer, asked.choices)
            checked = await asyncio.gather(*map(request.check, units))
            leaving = [request.let_out(unit, decision) for unit, decision in checked]
            head = answer.head or Head.own(wire.ID_PREFIX, asked.model)
            visit.answered(head, answer.usage)
            return wire.whole(asked, head, leaving, answer.usage or NO_TOKENS)

    async def stream(self, raw: Json, wire: Wire, visit: Visit) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer, of which the last says how it ended; raises as ``answer`` does."""
        sent: defaultdict[int, Sent] = defaultdict(Sent)
        async with self._at_work(raw, wire, visit) as request:
            asked, cut = request.asked, visit.policy.stream
            events = self._upstreams.stream(wire, asked)
            async with CheckedAnswer(events, request.decide, cut, self._settings, asked.choices) as answer:
                prompt = await request.decide_prompt()
                if prompt.allowed:
                    async for unit, decision in answer:
                        before = sent[unit.index]
                        settled = await request.settle(unit, decision, before)
                        leaving = request.let_out(*settled, started=before.started)
                        if leaving.blocked:
                            answer.drop(unit.index)
                        head = answer.head or Head.own(wire.ID_PREFIX, asked.model)
                        for event in wire.events(asked, head, leaving, before):
                            yield event
                        before.add(leaving)
            visit.answered(answer.head, answer.usage)

        # The generation has ended or has been cancelled; what was still held is gone.
        head = answer.head or Head.own(wire.ID_PREFIX, asked.model)
        if not prompt.allowed:
            for index in range(asked.choices):
                for event in wire.events(asked, head, instead(index, prompt), Sent()):
                    yield event
        elif answer.usage:
            for event in wire.usage_events(head, answer.usage):
                yield event

    @asynccontextmanager
    async def _at_work(self, raw: Json, wire: Wire, visit: Visit) -> AsyncIterator["_Request"]:
        """A request that is read, admitted and recorded. What the inference service says when it refuses is checked.

        Raises:
            RequestError, QuotaExceeded, UpstreamUnavailable: it cannot be served as asked, or not now.
            Overloaded: all places for requests at work are taken.
            PassedOn: the inference service refused; without its words when they are unsafe.
        """
        async with self._admission.recorded(visit):
            asked = wire.read(raw, self._settings, visit.policy.system_prompt)
            async with self._admission.admitted(visit, asked), self._place():
                checker = Checker(self._upstreams.classify, visit.policy, visit.note, self._settings.checks_in_flight)
                request = _Request(asked, visit, checker, self._upstreams.revise, self._settings)
                try:
                    yield request
                except PassedOn as refusal:
                    if not (await request.decide(0, [refusal.words()])).allowed:
                        raise refusal.without_detail() from refusal
                    raise

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._busy >= self._settings.requests_in_flight:
            raise Overloaded(f"{self._busy} requests are at work, which is the limit; try again later")
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1


class _Request:
    """The decisions on one request, and what they let out."""

    def __init__(self, asked: Asked, visit: Visit, checker: Checker, critic: Critic, settings: GatewaySettings) -> None:
        self.asked = asked
        self._visit = visit
        self._checker = checker
        self._critic = critic
        self._window_characters = settings.window_characters
        self._repairs = Repairs(
            self.decide, self._revise, visit.note_repair, visit.policy.stream, settings.context_characters
        )
        self._ledger = Ledger()

    async def decide_prompt(self) -> Decision:
        """Decide on all that the client sent."""
        items = prompt_items(self.asked, self._window_characters)
        decision = await self._checker.decide(items, Direction.PROMPT)
        self._ledger.record(decision)
        self._visit.happened(decision.action)
        return decision

    async def decide(self, index: int, texts: list[str]) -> Decision:
        """Decide on texts of one choice."""
        items = response_items(self.asked.prompt_of(index), texts, self._window_characters)
        return await self._checker.decide(items, Direction.RESPONSE)

    async def check(self, unit: Unit) -> tuple[Unit, Decision]:
        """What may leave for a choice that came as a whole, with the decision on it."""
        decision = await self.decide(unit.index, list(texts_to_check(unit.parts)))
        return await self.settle(unit, decision, Sent())

    async def settle(self, unit: Unit, decision: Decision, sent: Sent) -> tuple[Unit, Decision]:
        """What may leave for a unit, redacted or revised if need be, after ``sent`` of its choice."""
        return await self._repairs.settle(unit, decision, sent)

    def let_out(self, unit: Unit, decision: Decision, *, started: bool = False) -> Unit:
        """What leaves for a unit that is settled. The one place where something leaves, or does not.

        ``started`` says that some of the choice has left: then nothing can stand in its place.

        Raises:
            UncheckedRelease: the unit has other text than was decided on.
        """
        for part in unit.parts:
            self._ledger.record(decision, part.text, (unit.index, part.channel))
            self._ledger.record(decision, _told(part), (unit.index, "tokens"))
        leaving = self._released(unit) if decision.allowed else instead(unit.index, decision, started=started)
        if leaving.changed:
            self._visit.happened(leaving.changed.action)
        return leaving

    def _released(self, unit: Unit) -> Unit:
        for part in unit.parts:
            self._ledger.release(_told(part), (unit.index, "tokens"))
        parts = (replace(part, text=self._ledger.release(part.text, (unit.index, part.channel))) for part in unit.parts)
        leaving = replace(unit, parts=tuple(parts))
        self._visit.released += [part.text for part in leaving.parts]
        return leaving

    async def _revise(self, index: int, draft: str, decision: Decision) -> Revision:
        """The critique service's revision of one choice's content."""
        prompt = self.asked.prompt_of(index)
        revision = await self._critic(CritiqueItem(prompt=prompt, draft=draft, categories=list(decision.categories)))
        self._visit.constitution_sha256 = revision.critique.constitution_sha256
        return revision


def instead(index: int, decision: Decision, *, started: bool = False) -> Unit:
    """What leaves in place of a choice that may not."""
    parts = () if started else (Part(index, CONTENT, REFUSAL),)
    return Unit(index, parts, Finish(BLOCKED), decision)


def _told(part: Part) -> str:
    """All text in what is told about the tokens."""
    return "".join(text for token in part.tokens for text in token.texts)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``work`` beside the block; leaving the block cancels it, if it still runs."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
