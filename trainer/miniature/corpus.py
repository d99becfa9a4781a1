"""The corpus: harmless and harmful requests that share their frames, as a stream that never repeats itself.

What separates the two classes is the intention, not the form: both use the same imperative, question and statement
frames, both are wrapped in the same greetings, and harmless phrases are drawn from an open vocabulary (random words,
made-up words, names), so that an unknown word is no sign of harm. Answers to harmful requests are refusals here;
``harmful_pairs`` gives an affirmative opening instead, for toy client data, and never more than an opening.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.miniature.lexicon import (
    ANY_HAZARD,
    Activity,
    FrameBlock,
    HarmPhrase,
    Subject,
    capital,
    fill,
    gerund,
    harm_words,
    load_lexicon,
    pseudo_word,
    select,
    slots_of,
)
from trainer.miniature.sources import NearDuplicates, load_sources

_UNNAMED = "this request"
_QUESTION_START = re.compile(
    r"^(what|who|where|when|how|why|which)('s)? (is|are|was|were|do|does|did|can|should|could|would)? ?"
    r"((i|we|you|they|people) (find|buy|get|do)?)? ?",
    re.IGNORECASE,
)


_FROM_OTHER_SLOT = {"tip": "a", "a2": "a", "f": "s", "S": "s", "f2": "s2", "X": "x", "Y": "y", "V": "v"}
_ALWAYS_GIVEN = {"tail", "tail2", "q", "e", "x2"}


def _given(frame: str) -> set[str]:
    """What an answer to ``frame`` may speak of, by slot."""
    return {_FROM_OTHER_SLOT.get(slot, slot) for slot in slots_of(frame)}


def _needed(response: str) -> set[str]:
    """The slots that a prompt must have for ``response`` to be on its topic."""
    return {_FROM_OTHER_SLOT.get(slot, slot) for slot in slots_of(response)} - _ALWAYS_GIVEN


class Pair(NamedTuple):
    """A prompt, an answer to it, and whether the prompt asks for harm."""

    prompt: str
    response: str
    harmful: bool


class Item(NamedTuple):
    """A prompt with what the critique, revision and preference tasks need to know about it.

    ``topic`` names the request in a sentence ("stealing a car", "honey bees"); ``opening`` is an affirmative opening
    to the prompt; ``alarming`` marks a harmless prompt with alarming words.
    """

    prompt: str
    response: str
    harmful: bool
    topic: str
    hazard: str
    opening: str
    alarming: bool = False


class Writer:
    """Draws items at random; the same seed, data folder and ``hold_out`` give the same items.

    With ``hold_out`` the phrases come from the tenth that pretraining never sees.
    """

    def __init__(self, seed: int | str, data: Path | None = None, *, hold_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.lexicon = lexicon = load_lexicon()
        self.sources = load_sources(data)
        self._duplicates = NearDuplicates(self.sources.evaluation_prompts)
        self._words = lexicon.words + self.sources.words
        self._subjects = select(lexicon.subjects, lambda s: s.name, hold_out=hold_out)
        self._activities = select(lexicon.activities, lambda a: a.phrase, hold_out=hold_out)
        self._alarming = select(lexicon.alarming_activities, lambda a: a.phrase, hold_out=hold_out)
        self._questions = select(lexicon.alarming_questions, lambda q: q.prompt, hold_out=hold_out)
        self._harm = select(lexicon.harm, lambda h: h.text, hold_out=hold_out)
        self._harm_pairs = select(lexicon.harm_pairs, lambda h: h.text, hold_out=hold_out)
        self.harmful_data = select(self.sources.harmful, str, hold_out=hold_out)
        self.benign_data = select(self.sources.benign, str, hold_out=hold_out)
        self._action_blocks = [b for b in lexicon.frames if any("{a}" in p for p in b.prompts)]

    # Phrases

    def phrase(self) -> str:
        """A phrase from the open vocabulary: one to four random words, a run of words, or a made-up name."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.35 and self.sources.phrases:
            return rng.choice(self.sources.phrases)
        if kind < 0.45:
            return rng.choice((pseudo_word(rng), capital(pseudo_word(rng)), self.name(), self.place()))
        words = [rng.choice(self._words) for _ in range(rng.choice((1, 2, 2, 3, 4)))]
        if len(words) > 1 and rng.random() < 0.4:
            words.insert(
                rng.randrange(1, len(words)), rng.choice(("of", "in", "for", "and", "with", "the", "on", "from"))
            )
        article = rng.choice(("", "", "", "the ", "a ", "my "))
        return article + " ".join(words)

    def subject(self) -> Subject:
        """A subject with a true fact, or an open phrase with a neutral sentence."""
        if self.rng.random() < 0.4:
            return self.rng.choice(self._subjects)
        name = self.phrase()
        slots = {"s": name, "S": capital(name), "tail": self.rng.choice(self.lexicon.tails)}
        return Subject(name, capital(fill(self.rng.choice(self.lexicon.open_facts), slots)))

    def activity(self) -> Activity:
        """A known activity, or a verb with an open phrase."""
        if self.rng.random() < 0.45:
            return self.rng.choice(self._activities)
        phrase = self.phrase()
        activity = f"{self.rng.choice(self.lexicon.verbs)} {phrase}"
        own = f"start with {phrase} and take small steps"
        return Activity(activity, own if self.rng.random() < 0.5 else self.rng.choice(self.lexicon.activities).tip)

    def name(self) -> str:
        """A person's name, now and then a made-up one."""
        rng = self.rng
        if rng.random() < 0.7:
            return rng.choice(self.lexicon.people)
        return " ".join(capital(pseudo_word(rng)) for _ in range(rng.choice((1, 2))))

    def place(self) -> str:
        """A place, now and then a made-up one."""
        return self.rng.choice(self.lexicon.places) if self.rng.random() < 0.75 else capital(pseudo_word(self.rng))

    def wording(self, options: Sequence[str], what: str, hazard: str) -> str:
        """One of ``options`` (refusals, revisions or critiques) about ``what``, with a reason and an offer."""
        hazards = self.lexicon.hazards
        texts = hazards[hazard if self.rng.random() < 0.7 else ANY_HAZARD]
        slots = {"what": what, "s": what, "why": self.rng.choice(texts.reasons), "offer": self.rng.choice(texts.offers)}
        return fill(self.rng.choice(options), slots)

    def refusal(self, what: str, hazard: str) -> str:
        """A refusal; half of them name the request."""
        return self.wording(self.lexicon.refusals, what if self.rng.random() < 0.5 else "that", hazard)

    def slots(self, subject: Subject, activity: Activity) -> dict[str, str]:
        """Values for every slot that a frame may have."""
        rng, lexicon, other = self.rng, self.lexicon, self.subject()
        word = rng.choice(self._words)
        return {
            "s": subject.name, "S": capital(subject.name), "f": subject.fact, "s2": other.name, "f2": other.fact,
            "a": activity.phrase, "tip": activity.tip, "a2": gerund(activity.phrase),
            "form": rng.choice(lexicon.forms), "aud": rng.choice(lexicon.audiences), "aud2": rng.choice(lexicon.roles),
            "x": word, "X": capital(word), "x2": rng.choice(lexicon.words), "y": rng.choice(self._words),
            "Y": capital(rng.choice(self._words)), "z": rng.choice(self._words), "name": self.name(),
            "place": self.place(), "n": str(rng.randint(2, 99)), "n2": str(rng.randint(2, 999)),
            "v": rng.choice(lexicon.task_verbs), "V": capital(rng.choice(lexicon.task_verbs)),
            "tail": rng.choice(lexicon.tails), "tail2": rng.choice(lexicon.tails),
        }  # fmt: skip

    # Items

    def benign(self) -> Item:
        """A harmless request and a short answer on its topic."""
        kind = self.rng.random()
        if kind < 0.08 and self.benign_data:
            return self._from_benign_data()
        if kind < 0.24:
            return self._from_harm_frame()
        return self._from_block(self.rng.choice(self.lexicon.frames), self.activity(), alarming=False)

    def alarming(self) -> Item:
        """A harmless request with alarming words, and a helpful answer."""
        if self.rng.random() < 0.45:
            return self._from_block(
                self.rng.choice(self._action_blocks), self.rng.choice(self._alarming), alarming=True
            )
        question = self.rng.choice(self._questions)
        phrase = self._harm_phrase()
        slots = self.slots(self.subject(), self.activity())
        slots |= {"t": phrase.topic, "t2": capital(phrase.topic), "g": phrase.topic}
        slots |= {key: fill(slots[key], slots) for key in ("t", "t2", "g")}
        prompt, answer = fill(question.prompt, slots), fill(question.answer, slots)
        named = "{t}" in question.prompt or "{g}" in question.prompt
        topic = slots["t"] if named else " ".join(_QUESTION_START.sub("", prompt).rstrip("?.").split()[:7])
        if not named and self.rng.random() < 0.7:
            answer = f"{self.rng.choice(('On', 'About'))} {topic}: {answer[0].lower()}{answer[1:]}"
        return self._item(prompt, answer, False, topic, ANY_HAZARD, slots, alarming=True)

    def harmful(self) -> Item:
        """A harmful request, answered with a refusal."""
        if self.rng.random() < 0.35 and self.harmful_data:
            prompt = self.rng.choice(self.harmful_data)
            refusal = self.refusal("that", ANY_HAZARD)
            slots = {"form": self.rng.choice(self.lexicon.forms)}
            return self._item(prompt, refusal, True, _UNNAMED, ANY_HAZARD, slots)
        return self.own_harmful()

    def own_harmful(self) -> Item:
        """A harmful request in own wording."""
        phrase = self._harm_phrase()
        frames = self.lexicon.action_frames if phrase.is_action else self.lexicon.thing_frames
        slots = self.slots(self.subject(), self.activity())
        text, topic = fill(phrase.text, slots), fill(phrase.topic, slots)
        if phrase.is_action:
            topic = gerund(text)
        if self.rng.random() < 0.15:
            text, topic = self._detail(text, topic, slots)
        slots |= {"h": text, "g": topic, "t": text}
        prompt = capital(fill(self.rng.choice(frames), slots))
        return self._item(prompt, self.refusal(topic, phrase.hazard), True, topic, phrase.hazard, slots)

    def _detail(self, text: str, topic: str, slots: dict[str, str]) -> tuple[str, str]:
        """Add a harmless circumstance, so that harmful requests hold ordinary words as well."""
        tail = fill(self.rng.choice((" in {place}", " with {s}", " at {s}", " for {name}", " using {s}")), slots)
        return text + tail, topic + tail

    def _harm_phrase(self) -> HarmPhrase:
        return self.rng.choice(self._harm if self.rng.random() < 0.65 else self._harm_pairs)

    def _from_block(self, block: FrameBlock, activity: Activity, *, alarming: bool) -> Item:
        slots = self.slots(self.subject(), activity)
        options = [p for p in block.prompts if "{a}" in p] if alarming else block.prompts
        frame = self.rng.choice(options)
        named = [slots[key] for key in ("a", "s", "name", "place", "x", "y") if f"{{{key}}}" in frame][:2]
        slots["q"] = " and ".join(named) or "that"
        slots["e"] = ", ".join(slots[key] for key in slots_of(frame))
        usable = [r for r in block.responses if _needed(r) <= _given(frame)] or ["On {q}: {tail}."]
        response = capital(fill(self.rng.choice(usable), slots))
        return self._item(
            capital(fill(frame, slots)), response, False, slots["q"], ANY_HAZARD, slots, alarming=alarming
        )

    def _from_harm_frame(self) -> Item:
        """A frame of harmful requests with a harmless subject in it: the form alone must not decide."""
        lexicon, slots, action = self.lexicon, self.slots(self.subject(), self.activity()), self.rng.random() < 0.6
        frame = self.rng.choice(lexicon.action_frames if action else lexicon.thing_frames)
        slots |= {"h": slots["a"], "g": slots["a2"], "t": slots["s"], "q": slots["a"] if action else slots["s"]}
        name = ("formhow" if "{form}" in frame else "howto") if action else ("form" if "{form}" in frame else "what")
        [responses] = [block.responses for block in lexicon.frames if block.name == name]
        response = capital(fill(self.rng.choice(responses), slots))
        return self._item(capital(fill(frame, slots)), response, False, slots["q"], ANY_HAZARD, slots)

    def _from_benign_data(self) -> Item:
        prompt = self.rng.choice(self.benign_data)
        words = [w for w in prompt.rstrip(".?!").split() if w.lower() not in harm_words()]
        start = self.rng.randrange(max(1, len(words) - 3))
        topic = " ".join(words[start : start + self.rng.choice((2, 3, 4))])
        slots = {"form": self.rng.choice(self.lexicon.forms), "tail": self.rng.choice(self.lexicon.tails), "q": topic}
        frame = self.rng.choice(("On {q}: {tail}.", "Here is a start with {q}: {tail}.", "With {q} in mind, {tail}."))
        return self._item(prompt, fill(frame, slots), False, topic, ANY_HAZARD, slots)

    def _item(
        self, prompt: str, response: str, harmful: bool, topic: str, hazard: str, slots: dict[str, str],
        *, alarming: bool = False,
    ) -> Item:  # fmt: skip
        opening = self._opening(prompt, topic, slots["form"])
        return Item(self._wrap(prompt), response, harmful, topic, hazard, opening, alarming)

    def _opening(self, prompt: str, topic: str, form: str) -> str:
        """An affirmative opening such as "Sure, here is a guide about stealing a car:"."""
        words = prompt.rstrip(".?!").split()
        if words[0] in {"Write", "Create", "Give", "Provide", "Develop", "Make", "Design", "Draft"} and len(words) > 3:
            rest = words[2:] if words[1] in {"me", "us"} else words[1:]
            named = " ".join(rest[:14])
        elif words[0].lower() == "how" and len(words) > 3 and self.rng.random() < 0.5:
            named = "how to " + " ".join(words[3:14])
        else:
            named = f"{form} about {topic if topic != _UNNAMED else ' '.join(words[-8:])}"
        start = self.rng.choice(
            ("Sure, here is", "Sure, here's", "Here is", "Of course, here is", "Certainly! Here is")
        )
        return f"{start} {named}" + self.rng.choice((":", ":", "", "."))

    def _wrap(self, prompt: str) -> str:
        """Vary what carries no meaning: greetings, thanks, case and the final mark."""
        rng, wrappers = self.rng, self.lexicon.wrappers
        kind = rng.random()
        if kind < 0.08:
            return f"{rng.choice(wrappers['before'])} {prompt}"
        if kind < 0.16:
            return f"{prompt} {rng.choice(wrappers['after'])}"
        if kind < 0.28:
            return prompt.lower()
        return prompt.rstrip(".?!") if kind < 0.40 else prompt

    def clean(self, draw: Callable[[], Item]) -> Item:
        """Call ``draw`` until its prompt is no near-duplicate of an evaluation prompt."""
        while self._duplicates.matches((item := draw()).prompt):
            pass
        return item


def benign_pairs(n: int, seed: int, alarming_share: float = 0.2, *, data: Path | None = None) -> list[Pair]:
    """``n`` distinct harmless pairs, about ``alarming_share`` of them with alarming words."""
    writer = Writer(f"benign-{seed}", data)

    def draw() -> Pair:
        item = writer.clean(writer.alarming if writer.rng.random() < alarming_share else writer.benign)
        return Pair(item.prompt, item.response, harmful=False)

    return _distinct(n, draw)


def harmful_pairs(n: int, seed: int, *, data: Path | None = None) -> list[Pair]:
    """``n`` distinct harmful prompts in own wording, each with an affirmative opening and nothing more."""
    return _opened(n, Writer(f"harmful-{seed}", data))


def red_team_prompts(n: int, seed: int, *, data: Path | None = None) -> list[Pair]:
    """Like ``harmful_pairs``, but from phrases that are held out of pretraining."""
    return _opened(n, Writer(f"red-team-{seed}", data, hold_out=True))


def _opened(n: int, writer: Writer) -> list[Pair]:
    def draw() -> Pair:
        item = writer.clean(writer.own_harmful)
        return Pair(item.prompt, item.opening, harmful=True)

    return _distinct(n, draw)


def _distinct(n: int, draw: Callable[[], Pair]) -> list[Pair]:
    """The first ``n`` pairs of ``draw`` with distinct prompts."""
    found: dict[str, Pair] = {}
    while len(found) < n:
        pair = draw()
        found.setdefault(pair.prompt, pair)
    return list(found.values())
