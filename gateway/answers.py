"""What is answered, in one shape for every protocol: read from upstream, checked, and written for the client.

Everything that leaves is built from these fields, so that a field which nobody checked cannot slip through from
upstream. Names and times are our own; of upstream's words only a hash of its weights and the ids of calls are kept.
"""

import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

from gateway.asked import strings_in
from gateway.policy import Action, Decision, worst
from services.contracts.chat import Json, Usage
from services.contracts.errors import ErrorDetail, UpstreamUnavailable

CONTENT = "content"  # the channel of the answer itself; others are reasoning, refusal and calls
BLOCKED = "content_filter"
REVISED = "stop"  # how a revision ends; TGI has a word of its own for it
_CALL_ID = re.compile(r"[A-Za-z0-9._:/@+-]{1,200}")
_HASH = re.compile(r"(?:fp_)?[0-9a-f]{8,64}")


def checked_call_id(call_id: str) -> str:
    """The id of a call as the inference service gave it; raises UpstreamUnavailable when it is something else."""
    if call_id and not _CALL_ID.fullmatch(call_id):
        raise UpstreamUnavailable("inference", "sent text where the id of a call should be")
    return call_id


def hash_or_none(text: str | None) -> str | None:
    """What may be a hash, as it is; None for any other text, which nobody has checked."""
    return text if text and _HASH.fullmatch(text) else None


@dataclass(frozen=True)
class Head:
    """The fields that every part of one OpenAI answer repeats.

    ``model`` is the name that was asked for. Which weights answered to it ``system_fingerprint`` says, where the
    inference service tells it by a hash.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None

    @classmethod
    def own(cls, prefix: str, model: str) -> "Head":
        """For a new answer."""
        return cls(f"{prefix}{uuid.uuid4().hex}", int(time.time()), model)

    def by(self, fingerprint: str | None) -> "Head":
        """The same, written by the weights with this fingerprint; nothing else than a hash is one."""
        if fingerprint == self.system_fingerprint:
            return self
        known = hash_or_none(fingerprint)
        return replace(self, system_fingerprint=known) if known else self


class Token(NamedTuple):
    """What is told about one token, as it leaves; and its texts: the chosen one, then the alternatives by rank.

    A token that is a part of a character has its bytes as text, escaped as Python's ``surrogateescape`` does.
    """

    shape: Json
    texts: tuple[str, ...]


class Call(NamedTuple):
    """A call of a function, or a piece of one; ``position`` is None for the older ``function_call``."""

    position: int | None
    id: str
    name: str
    arguments: str

    def joined(self, more: "Call") -> "Call":
        """This piece and the one after it."""
        return Call(self.position, self.id or more.id, self.name + more.name, self.arguments + more.arguments)


@dataclass(frozen=True)
class Part:
    """Some text of one channel of one choice, with what is told about the tokens that end in it, or a call."""

    index: int
    channel: str
    text: str
    tokens: tuple[Token, ...] = ()
    call: Call | None = None

    @classmethod
    def of_call(cls, index: int, channel: str, call: Call) -> "Part":
        """A call, or a piece of one; its text is what is checked."""
        return cls(index, channel, f"{call.name}\n{call.arguments}", call=call)


@dataclass(frozen=True)
class Finish:
    """How a choice ended, in the protocol's own word, and the numbers that TGI tells of it."""

    reason: str
    facts: Json = field(default_factory=dict)


class Event(NamedTuple):
    """What one event of a stream brings, or all of a whole answer."""

    head: Head
    parts: list[Part]
    finishes: dict[int, Finish]
    usage: Usage | None = None


@dataclass(frozen=True)
class Unit:
    """What is decided on as one and then leaves as one; the last unit of a choice has its ``finish``.

    ``changed`` is the decision that kept it from leaving as it came.
    """

    index: int
    parts: tuple[Part, ...]
    finish: Finish | None = None
    changed: Decision | None = None

    @property
    def blocked(self) -> bool:
        """A refusal leaves in its place, and its choice ends with it."""
        return self.changed is not None and self.changed.action is Action.REFUSE

    def text(self, channel: str = CONTENT) -> str:
        """The text of one channel."""
        return "".join(part.text for part in self.parts if part.channel == channel)

    def tokens(self) -> list[Token]:
        """All tokens that leave with it."""
        return [token for part in self.parts for token in part.tokens]

    def without_tokens(self) -> "Unit":
        """The same text and calls, with nothing told about tokens."""
        parts = tuple(replace(part, tokens=()) for part in self.parts if part.text)
        return replace(self, parts=parts)


@dataclass
class Sent:
    """What has left of one choice so far: the text of each channel, and how many tokens were told about.

    Of a repaired choice, of which no tokens are told, each unit counts as one.
    """

    started: bool = False
    repaired: bool = False
    texts: defaultdict[str, str] = field(default_factory=lambda: defaultdict(str))
    tokens: int = 0

    def add(self, unit: Unit) -> None:
        """Note that ``unit`` has left."""
        self.started = True
        self.repaired = self.repaired or unit.changed is not None
        for part in unit.parts:
            self.texts[part.channel] += part.text
        self.tokens += len(unit.tokens()) or int(self.repaired)


def whole_units(event: Event, choices: int) -> list[Unit]:
    """A whole answer, one unit for each choice; raises UpstreamUnavailable unless as many came as were asked for."""
    if sorted(event.finishes) != list(range(choices)) or any(part.index not in event.finishes for part in event.parts):
        raise UpstreamUnavailable("inference", f"gave {len(event.finishes)} answers where {choices} were asked for")
    return [
        Unit(index, tuple(part for part in event.parts if part.index == index), event.finishes[index])
        for index in range(choices)
    ]


def texts_to_check(parts: Iterable[Part]) -> Iterator[str]:
    """Every text that the parts would show."""
    for part in parts:
        yield part.text
        if part.call:
            if part.call.id:  # a name by its form, but some models write it
                yield part.call.id
            meant = "\n".join(strings_in(part.call.arguments))
            if meant != part.call.arguments:
                yield meant
        yield from token_texts(part.tokens, part.text)


def token_texts(tokens: Iterable[Token], text: str) -> Iterator[str]:
    """One text with what the tokens show beside ``text``: alternatives, and chosen ones that say something else.

    Those of one rank are put together, as somebody would read them.
    """
    ranks = (_joined(rank) for rank in zip_longest(*(token.texts for token in tokens), fillvalue=""))
    others = [rank for rank in ranks if rank not in text]
    if others:
        yield "\n".join(others)


def _joined(texts: Iterable[str]) -> str:
    """Texts of tokens as one text; parts of a character, which are escaped bytes, become the character."""
    return "".join(texts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _note(decision: Decision) -> Json:
    return {
        "blocked": decision.action is Action.REFUSE,
        "decision": decision.action.value,
        "direction": decision.direction.value,
        "categories": list(decision.categories),
        "reason": decision.reason,
    }


def note_on(units: Sequence[Unit]) -> Json:
    """What the client is told of choices that did not leave as they came, to be added to a whole answer's body.

    The decision is the worst one; which choices are blocked, their ``finish_reason`` says.
    """
    changed = {unit.index: unit.changed for unit in units if unit.changed}
    if not changed:
        return {}
    return {"fedward": _note(worst(changed.values())) | {"choices": list(changed)}}


def with_note(events: list[Json], unit: Unit) -> list[Json]:
    """The events of a unit; when it did not leave as it came, the first of them says so.

    The error object of a blocked one stands inside ``fedward``: at the top level clients would raise it as a failure,
    and their callers would never see how the answer ended.
    """
    if unit.changed:
        reason = unit.changed.reason
        error = {"error": ErrorDetail(message=reason, type=BLOCKED, code=BLOCKED).model_dump()} if unit.blocked else {}
        events[0]["fedward"] = _note(unit.changed) | error
    return events
