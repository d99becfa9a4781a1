"""What leaves of an unsafe answer: for any text, cut anyhow, the unsafe parts never do and the safe ones do."""

import asyncio
import re
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import CONTENT, Call, Event, Finish, Head, Part, Sent, Unit, texts_to_check
from gateway.policy import Action, Decision, Direction, StreamPolicy, StreamUnit
from gateway.repair import Decide, Outcome, Repairs
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer
from services.contracts.critique import Critique, Revision

BAD, GRAVE = "bad", "grave"
HEAD = Head("1", 1, "m")
REFUSED = "(refused)"
SETTINGS = GatewaySettings()
SENTENCES, BY_LENGTH, HELD = (StreamPolicy(unit=unit, max_characters=20) for unit in StreamUnit)
CRITIQUE = Critique(critique="Problem: so.", problem=True, principle_id="p", constitution_sha256="c", model_id="m")


def decided(action: Action) -> Decision:
    return Decision(action, Direction.RESPONSE)


async def judge(index: int, texts: list[str]) -> Decision:
    """Unsafe is what says so."""
    for word, action in ((GRAVE, Action.REFUSE), (BAD, Action.REDACT)):
        if any(word in text for text in texts):
            return decided(action)
    return decided(Action.ALLOW)


async def revise(index: int, draft: str, decision: Decision) -> Revision:
    return Revision(revision=f"Not: {draft}", revised=True, critique=CRITIQUE)


class Machine:
    """Repairs with a judge that knows two words, and what was noted of them."""

    def __init__(self, stream: StreamPolicy = SENTENCES, context_characters: int = 10, decide: Decide = judge) -> None:
        self.notes: list[tuple[int, Action, str]] = []
        self.settings = SETTINGS.model_copy(update={"context_characters": context_characters})
        self.stream = stream
        self.repairs = Repairs(decide, revise, lambda *note: self.notes.append(note), stream, context_characters)

    async def whole(self, *parts: Part) -> str:
        """What leaves of a whole answer."""
        unit = Unit(0, parts, Finish("stop"))
        leaving, decision = await self.repairs.settle(unit, await judge(0, list(texts_to_check(parts))), Sent())
        return leaving.text() if decision.allowed else REFUSED

    async def streamed(self, pieces: list[str]) -> str:
        """What leaves of a streamed answer, unit by unit, and whether it ends by a refusal."""
        sent = Sent()
        async with CheckedAnswer(events(pieces), judge, self.stream, self.settings, 1) as answer:
            async for unit, decision in answer:
                leaving, decision = await self.repairs.settle(unit, decision, sent)
                if not decision.allowed:
                    return sent.texts[CONTENT] + REFUSED
                sent.add(leaving)
        return sent.texts[CONTENT]

    def both(self, pieces: list[str]) -> tuple[str, str]:
        """What leaves of the same answer, whole and streamed."""

        async def run() -> tuple[str, str]:
            return await self.whole(said("".join(pieces))), await self.streamed(pieces)

        return asyncio.run(run())


async def events(pieces: list[str]) -> AsyncGenerator[Event, None]:
    for i, piece in enumerate(pieces):
        yield Event(HEAD, [said(piece)], {})
        if i % 3 == 0:  # so that some checks are done before the next piece comes, and some are not
            await asyncio.sleep(0)
    yield Event(HEAD, [], {0: Finish("stop")})


def said(text: str, channel: str = CONTENT) -> Part:
    return Part(0, channel, text)


WORDS = ["bad", "ba", "d", "b", "ad", "good", "好。", ". ", "! ", "\n", " ", "?", "x" * 25, "grave"]


@given(st.lists(st.sampled_from(WORDS), max_size=30), st.sampled_from([SENTENCES, BY_LENGTH, HELD]), st.integers(3, 30))
def test_nothing_unsafe_leaves_and_the_order_is_kept(pieces: list[str], stream: StreamPolicy, context: int) -> None:
    text = "".join(pieces)
    for left in Machine(stream, context).both(pieces):
        shown = left.removesuffix(REFUSED)
        assert BAD not in shown
        assert GRAVE not in shown
        pattern = r"(?s:.+)".join(map(re.escape, shown.split("[removed]")))
        assert (re.match if left.endswith(REFUSED) else re.fullmatch)(pattern, text), f"{left!r} is not in order"
        assert BAD in text or GRAVE in text or left == text, "what is safe leaves as it came"


FULL_SENTENCES = ["All is well. ", "A bad one. ", "As bad as can be!  ", "It is so bad.\n", "好。", "Yes!\n\n"]


@given(st.lists(st.sampled_from(FULL_SENTENCES), max_size=12), st.integers(1, 7), st.integers(0, 30))
def test_every_safe_sentence_leaves(sentences: list[str], length: int, context: int) -> None:
    """Of sentences that are judged alike by themselves and with others."""
    text = "".join(sentences)
    pieces = [text[i : i + length] for i in range(0, len(text), length)]
    left = "".join(f"[removed]{one[len(one.rstrip()) :]}" if BAD in one else one for one in sentences)
    for stream in SENTENCES, HELD:
        assert Machine(stream, context).both(pieces) == (left, left)


@pytest.mark.parametrize(
    ("parts", "stream", "outcome"),
    [
        ([said("Well. "), Part.of_call(0, "tool_calls", Call(0, "1", "f", '"bad"'))], SENTENCES, Outcome.CALLS),
        ([said("x" * 18 + BAD)], BY_LENGTH, Outcome.ONLY_AS_WHOLE),
        ([said("Bad is bad. ", "reasoning"), said("Good.")], SENTENCES, Outcome.DONE),
    ],
)
def test_outcome_of_a_whole_answer_is_noted(parts: list[Part], stream: StreamPolicy, outcome: Outcome) -> None:
    machine = Machine(stream)
    assert asyncio.run(machine.whole(*parts)) == ("Good." if outcome is Outcome.DONE else REFUSED)
    assert machine.notes == [(0, Action.REDACT, outcome)]


def settled(machine: Machine, unit: Unit, action: Action, sent: Sent | None = None) -> tuple[Unit, Action]:
    leaving, decision = asyncio.run(machine.repairs.settle(unit, decided(action), sent or Sent()))
    return leaving, decision.action


def test_unit_that_is_worse_than_the_whole_is_a_refusal() -> None:
    async def mild_on_the_whole(index: int, texts: list[str]) -> Decision:
        return decided(Action.REFUSE if texts == ["Two bad. "] else Action.REDACT)

    machine = Machine(decide=mild_on_the_whole)
    _, action = settled(machine, Unit(0, (said("One. Two bad. "),), Finish("stop")), Action.REDACT)
    assert (action, machine.notes) == (Action.REFUSE, [(0, Action.REDACT, Outcome.WORSE_UNIT)])


@pytest.mark.parametrize("finish", [None, Finish("stop")])
@pytest.mark.parametrize("action", [Action.REDACT, Action.REVISE])
def test_what_stands_in_its_place_has_to_be_allowed_too(action: Action, finish: Finish | None) -> None:
    async def redact(index: int, texts: list[str]) -> Decision:
        return decided(Action.REDACT)

    machine = Machine(decide=redact)
    _, done = settled(machine, Unit(0, (said("One bad. "),), finish), action)
    not_whole = action is Action.REVISE and finish is None
    assert done is Action.REFUSE
    assert machine.notes == [(0, action, Outcome.NOT_WHOLE if not_whole else Outcome.STILL_UNSAFE)]


def test_end_of_a_stream_goes_where_it_is_unsafe_only_with_what_has_left() -> None:
    sent = Sent()
    sent.add(Unit(0, (said("So ba"),)))
    leaving, action = settled(Machine(), Unit(0, (said("d it is. "),), Finish("stop")), Action.REDACT, sent)
    assert (leaving.text(), action) == ("[removed] ", Action.ALLOW)
    sent.add(Unit(0, (said("d"),)))
    _, action = settled(Machine(), Unit(0, (), Finish("stop")), Action.REDACT, sent)
    assert action is Action.REFUSE, "there is nothing left to remove"


def test_unit_after_a_removal_is_decided_on_with_what_has_left() -> None:
    sent = Sent(repaired=True)
    sent.add(Unit(0, (said("[removed] So ba"),)))
    for text, left in (("d it is. ", "[removed] "), ("nd it is. ", "nd it is. ")):
        assert settled(Machine(), Unit(0, (said(text),)), Action.REDACT, sent)[0].text() == left


def test_whole_of_what_has_left_counts_at_the_end_even_if_the_rest_was_allowed() -> None:
    sent = Sent(repaired=True)
    sent.add(Unit(0, (said("ba"),)))
    sent.add(Unit(0, (said("Fine. ", "reasoning"),)))
    leaving, _ = settled(Machine(), Unit(0, (said("d"),), Finish("stop")), Action.ALLOW, sent)
    assert leaving.text() == "[removed]"


def test_revision_stands_for_all_of_the_choice() -> None:
    unit = Unit(0, (said("Hm. ", "reasoning"), said("Go away. ")), Finish("length"))
    leaving, action = settled(Machine(), unit, Action.REVISE)
    changed = decided(Action.REVISE)
    assert leaving == Unit(0, (said("Not: Go away. "),), Finish("stop"), changed)
    assert action is Action.ALLOW
