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
leaves before the prompt's verdict, and no text leaves before its own (``request.py``). What is unsafe is redacted,
revised or refused (``repair.py``). Whatever fails, fails closed: an error ends the request and what is held is dropped.
Every request leaves a record in the audit, however it ends.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from gateway.admission import Admission
from gateway.answers import Head, Sent, whole_units
from gateway.protocols import Wire
from gateway.request import Request, instead
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer
from gateway.tasks import beside, together
from gateway.upstreams import PassedOn, Upstreams
from gateway.visits import Visit
from services.contracts.chat import Json, Usage
from services.contracts.errors import Overloaded

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
            async with beside(self._upstreams.complete(wire, asked)) as generation:
                decision = await request.decide_prompt()
                if not decision.allowed:  # leaving cancels the generation
                    refusals = [instead(index, decision) for index in range(asked.choices)]
                    return wire.whole(asked, Head.own(wire.ID_PREFIX, asked.model), refusals, NO_TOKENS)
                answer = await generation

            units = whole_units(answer, asked.choices)
            checked = await together(map(request.check, units))
            leaving = [request.let_out(unit, decision) for unit, decision in checked]
            visit.answered(answer.head, answer.usage)
            return wire.whole(asked, answer.head, leaving, answer.usage or NO_TOKENS)

    async def stream(self, raw: Json, wire: Wire, visit: Visit) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer, of which the last says how it ended; raises as ``answer`` does."""
        sent: defaultdict[int, Sent] = defaultdict(Sent)
        async with self._at_work(raw, wire, visit) as request:
            asked, cut = request.asked, visit.policy.stream
            events = self._upstreams.stream(wire, asked)
            async with CheckedAnswer(events, request.decide, cut, self._settings, asked.choices) as answer:
                visit.held = answer.held
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
    async def _at_work(self, raw: Json, wire: Wire, visit: Visit) -> AsyncIterator[Request]:
        """A request that is read, admitted and recorded. What the inference service says when it refuses is checked.

        Raises:
            RequestError, QuotaExceeded, UpstreamUnavailable: it cannot be served as asked, or not now.
            Overloaded: all places for requests at work are taken.
            PassedOn: the inference service refused; without its words when they are unsafe.
        """
        async with self._admission.recorded(visit):
            asked = wire.read(raw, self._settings, visit.policy.system_prompt)
            async with self._admission.admitted(visit, asked), self._place():
                request = Request(asked, visit, self._upstreams, self._settings)
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
