"""What may leave of a choice that was found unsafe: redacted or revised where the policy says so, and else nothing.

::

    redact   a unit of a stream                    REMOVED in its place
             a whole answer, or a stream's rest    REMOVED in place of each sentence that is unsafe by itself
    revise   a whole answer of which nothing left  the critique service's revision in its place

Whatever was put together here is decided on as it would be read, after what has left of its choice; only an allowance
lets it go. Whatever cannot be done is refused.
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from enum import StrEnum
from typing import Any

from gateway.answers import CONTENT, REVISED, Finish, Part, Sent, Unit, texts_to_check
from gateway.asked import has_words
from gateway.metrics import REPAIRS
from gateway.policy import REMOVED, Action, Decision, StreamPolicy, milder
from gateway.segments import pieces_of
from gateway.tasks import together
from services.common.logs import get_logger
from services.contracts.critique import Revision
from services.contracts.errors import UpstreamUnavailable

Decide = Callable[[int, list[str]], Coroutine[Any, Any, Decision]]
Revise = Callable[[int, str, Decision], Awaitable[Revision]]
Note = Callable[[int, Action, str], None]


class Outcome(StrEnum):
    """What came of a repair, for the audit and the metrics; all but the first end in a refusal."""

    DONE = "done"
    CALLS = "calls"  # calls can be neither redacted nor revised
    NOT_WHOLE = "not_whole"  # to be revised, but some of it has left, or more is to come
    NOT_REVISED = "not_revised"  # the critique service finds nothing to revise, or rejects its own revision
    ONLY_AS_WHOLE = "only_as_whole"  # no unit of it is unsafe by itself
    WORSE_UNIT = "worse_unit"  # a unit by itself has to be treated worse than the whole
    STILL_UNSAFE = "still_unsafe"  # what was put in its place is not allowed either
    UNAVAILABLE = "unavailable"  # the critique or the safety service gave no answer


class _Impossible(Exception):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Repairs:
    """The repairs of one request's answer.

    Args:
        decide: decides on texts of one choice.
        revise: asks for a revision of one choice's content, found unsafe by this decision.
        note: is told what came of each repair.
        stream: how the answer is cut.
        context_characters: how much of what has left is checked along with a unit.
    """

    def __init__(
        self, decide: Decide, revise: Revise, note: Note, stream: StreamPolicy, context_characters: int
    ) -> None:
        self._decide = decide
        self._revise = revise
        self._note = note
        self._stream = stream
        self._context_characters = context_characters

    async def settle(self, unit: Unit, decision: Decision, sent: Sent) -> tuple[Unit, Decision]:
        """What may leave for a unit that was decided on, with the decision that allows it, or with a refusal.

        After a removal the decision was made along with text that has not left: what it found unsafe may be safe
        without, and at the end all that has left counts. Tokens are told no more, since they may reach into that text.
        """
        if sent.repaired:
            unit = unit.without_tokens()
            if unit.finish or not decision.allowed:
                decision = await self._decide_as_read(unit, sent)
        if decision.allowed or decision.action is Action.REFUSE:
            return unit, decision
        try:
            redact = decision.action is Action.REDACT
            repaired = await (self._redacted(unit, sent) if redact else self._revised(unit, decision, sent))
            allowance = await self._decide_as_read(repaired, sent)
            outcome = Outcome.DONE if allowance.allowed else Outcome.STILL_UNSAFE
        except _Impossible as impossible:
            outcome = impossible.outcome
        except UpstreamUnavailable as error:
            get_logger().warning("repair failed", action=decision.action.value, error=error.message)
            outcome = Outcome.UNAVAILABLE
        REPAIRS.labels(decision.action.value, outcome.value).inc()
        self._note(unit.index, decision.action, outcome.value)
        if outcome is not Outcome.DONE:
            return unit, decision.or_refuse()
        return replace(repaired, changed=decision), allowance

    async def _decide_as_read(self, unit: Unit, sent: Sent) -> Decision:
        """Decide on a unit along with what has left before it: all of it at the end of a choice, else a stretch."""
        said = [part for part in unit.parts if not part.call]
        if unit.finish:
            channels = dict.fromkeys((*sent.texts, *(part.channel for part in said)))
            texts = [sent.texts[channel] + unit.text(channel) for channel in channels]
            texts += texts_to_check(part for part in unit.parts if part.call)
        else:
            texts = [_end_of(sent.texts[part.channel], self._context_characters) + part.text for part in said]
        return await self._decide(unit.index, texts)

    async def _redacted(self, unit: Unit, sent: Sent) -> Unit:
        """The unit with ``REMOVED`` in it; where it is unsafe by what is told about tokens, leaving that out may do.

        The rest of a stream goes as a whole, as other units do, when it is unsafe only with what has left before it.
        """
        plain = unit.without_tokens()
        if unit.finish is None:
            return _all_removed(plain)
        redacted = await self._unsafe_pieces_removed(plain)
        if redacted == plain and sent.started:
            redacted = _all_removed(plain)
        if redacted == unit:
            raise _Impossible(Outcome.ONLY_AS_WHOLE)
        return redacted

    async def _unsafe_pieces_removed(self, unit: Unit) -> Unit:
        """``REMOVED`` in place of every piece that is unsafe by itself; what has no words has no verdict by itself."""
        cut = [list(texts_to_check([part])) if part.call else pieces_of(part.text, self._stream) for part in unit.parts]
        judged = list(dict.fromkeys(piece for pieces in cut for piece in pieces if has_words(piece)))
        decisions = await together(self._decide(unit.index, [piece]) for piece in judged)
        if any(milder(Action.REDACT, decision.action) for decision in decisions):
            raise _Impossible(Outcome.WORSE_UNIT)
        unsafe = {piece for piece, decision in zip(judged, decisions, strict=True) if not decision.allowed}
        parts = []
        for part, pieces in zip(unit.parts, cut, strict=True):
            if part.call and not unsafe.isdisjoint(pieces):
                raise _Impossible(Outcome.CALLS)
            text = "".join(_removed(piece) if piece in unsafe else piece for piece in pieces)
            parts.append(part if part.call else replace(part, text=text))
        return replace(unit, parts=tuple(parts))

    async def _revised(self, unit: Unit, decision: Decision, sent: Sent) -> Unit:
        """The revision in place of all that the choice says, its reasoning too."""
        if sent.started or unit.finish is None:
            raise _Impossible(Outcome.NOT_WHOLE)
        if any(part.call for part in unit.parts):
            raise _Impossible(Outcome.CALLS)
        revision = await self._revise(unit.index, unit.text(), decision)
        if not revision.revised or revision.rejected_because or not has_words(revision.revision):
            raise _Impossible(Outcome.NOT_REVISED)
        return Unit(unit.index, (Part(unit.index, CONTENT, revision.revision),), Finish(REVISED))


def _all_removed(unit: Unit) -> Unit:
    parts = (part if part.call else replace(part, text=_removed(part.text)) for part in unit.parts)
    return replace(unit, parts=tuple(parts))


def _removed(text: str) -> str:
    """What stands in place of a text; the white space around it stays."""
    words = text.strip()
    return text.replace(words, REMOVED) if words else text


def _end_of(text: str, size: int) -> str:
    return text[max(0, len(text) - size) :]
