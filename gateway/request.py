"""One request at work: the decisions on its prompt and its answer, and what they let out."""

from dataclasses import replace
from functools import partial

from gateway.answers import BLOCKED, CONTENT, Finish, Part, Sent, Unit, texts_to_check
from gateway.asked import Asked
from gateway.checks import Checker, prompt_items, response_items
from gateway.metrics import Ledger
from gateway.policy import Decision, Direction
from gateway.repair import Repairs
from gateway.settings import GatewaySettings
from gateway.upstreams import Upstreams
from gateway.visits import Visit
from services.contracts.critique import CritiqueItem, Revision

REFUSAL = "I'm sorry, but I can't help with that."


class Request:
    """The decisions on one request under its visit's policy.

    Args:
        asked: what is asked.
        visit: is told of every decision, and of what has left.
        upstreams: the services that classify and revise.
        settings: limits.
    """

    def __init__(self, asked: Asked, visit: Visit, upstreams: Upstreams, settings: GatewaySettings) -> None:
        self.asked = asked
        self._visit = visit
        self._upstreams = upstreams
        self._window_characters = settings.window_characters
        self._context_characters = settings.context_characters
        classify = partial(upstreams.classify, visit.identity.tenant)
        self._checker = Checker(classify, visit.policy, visit.note)
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
        """What may leave for a unit after ``sent`` of its choice, redacted or revised if need be."""
        # Made anew and not kept: objects that hold each other are left to the garbage collector, which stalls streams.
        repairs = Repairs(
            self.decide, self._revise, self._visit.note_repair, self._visit.policy.stream, self._context_characters
        )
        return await repairs.settle(unit, decision, sent)

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
        item = CritiqueItem(prompt=self.asked.prompt_of(index), draft=draft, categories=list(decision.categories))
        revision = await self._upstreams.revise(item)
        self._visit.constitution_sha256 = revision.critique.constitution_sha256
        return revision


def instead(index: int, decision: Decision, *, started: bool = False) -> Unit:
    """What leaves in place of a choice that may not."""
    parts = () if started else (Part(index, CONTENT, REFUSAL),)
    return Unit(index, parts, Finish(BLOCKED), decision)


def _told(part: Part) -> str:
    """All text in what is told about the tokens."""
    return "".join(text for token in part.tokens for text in token.texts)
