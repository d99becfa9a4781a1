"""The hand-written ingredients of the corpus: subjects, activities, frames, harmful topics, wordings.

All text stands in ``data/`` as plain files and is this project's own wording. Harm-related lines name a topic and an
intention only. A fixed tenth of every ingredient list is held out of pretraining, by a hash of its text, so that
probes and red-team prompts can use phrases that the model has never seen.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import NamedTuple, TypeVar

HELD_OUT_SHARE = 10
ANY_HAZARD = "ALL"
_T = TypeVar("_T")
_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[A-Za-z]{3,}")
_DOUBLED = re.compile(r"^[^aeiou]*[aeiou][^aeiouwxy]$")


class Subject(NamedTuple):
    """Something to ask about, and one true sentence on it (or a neutral one)."""

    name: str
    fact: str


class Activity(NamedTuple):
    """A verb phrase ("bake bread") and advice that fits it ("gather the ingredients first")."""

    phrase: str
    tip: str


class HarmPhrase(NamedTuple):
    """A harmful topic: a verb phrase when ``is_action``, else a noun phrase; ``hazard`` is S1 to S14."""

    hazard: str
    text: str
    is_action: bool

    @property
    def topic(self) -> str:
        """The phrase as it fits after "help with"."""
        return gerund(self.text) if self.is_action else self.text


class FrameBlock(NamedTuple):
    """Prompts and answers of one kind; any prompt of a block goes with any of its answers."""

    name: str
    prompts: tuple[str, ...]
    responses: tuple[str, ...]


class HazardWording(NamedTuple):
    """Why a request of one hazard is declined, and what can be offered instead."""

    reasons: tuple[str, ...]
    offers: tuple[str, ...]


class Question(NamedTuple):
    """A harmless question with alarming words, and its answer; both may hold slots."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Lexicon:
    """Everything from the data files, split by ``held_out`` where phrases are concerned."""

    subjects: tuple[Subject, ...]
    activities: tuple[Activity, ...]
    alarming_activities: tuple[Activity, ...]
    alarming_questions: tuple[Question, ...]
    harm: tuple[HarmPhrase, ...]
    harm_pairs: tuple[HarmPhrase, ...]
    frames: tuple[FrameBlock, ...]
    action_frames: tuple[str, ...]
    thing_frames: tuple[str, ...]
    hazards: dict[str, HazardWording]
    refusals: tuple[str, ...]
    revisions: tuple[str, ...]
    critiques: dict[str, tuple[str, ...]]
    wrappers: dict[str, tuple[str, ...]]
    tails: tuple[str, ...]
    open_facts: tuple[str, ...]
    verbs: tuple[str, ...]
    task_verbs: tuple[str, ...]
    words: tuple[str, ...]
    forms: tuple[str, ...]
    audiences: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]
    roles: tuple[str, ...]


def held_out(text: str) -> bool:
    """Whether ``text`` belongs to the fixed tenth that pretraining never sees."""
    return hashlib.sha256(text.encode()).digest()[0] * HELD_OUT_SHARE < 256


def gerund(phrase: str) -> str:
    """Turn "steal a car" into "stealing a car"."""
    verb, _, rest = phrase.partition(" ")
    if verb in {"kidnap", "traffic"}:
        stem = verb + verb[-1].replace("c", "k")
    elif verb.endswith("ie"):
        stem = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        stem = verb[:-1]
    else:
        stem = verb + verb[-1] if _DOUBLED.match(verb) else verb
    return f"{stem}ing {rest}".rstrip()


def fill(template: str, slots: dict[str, str]) -> str:
    """Put ``slots`` into ``template``; raises KeyError for a slot that is not there."""
    return _SLOT.sub(lambda match: slots[match[1]], template)


def slots_of(template: str) -> list[str]:
    """The slot names of a template, in order."""
    return _SLOT.findall(template)


def capital(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def pseudo_word(rng: random.Random) -> str:
    """A made-up word, so that an unknown word is no sign of harm."""
    parts = ("bcdfghjklmnprstvwz", "aeiou", ["", "", "n", "r", "s", "l", "ck"])
    return "".join(rng.choice(part) for _ in range(rng.choice((2, 2, 3))) for part in parts)


def _lines(name: str) -> list[str]:
    text = files("trainer.miniature").joinpath("data", name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())


def _phrases(text: str) -> list[str]:
    """``a; b`` as it stands, or every verb with every object for ``pair: v; w => x; y``."""
    if not text.startswith("pair:"):
        return list(_parts(text))
    verbs, objects = text.removeprefix("pair:").split("=>")
    return [f"{verb} {thing}" for verb, thing in product(_parts(verbs), _parts(objects))]


def _activities(name: str) -> tuple[Activity, ...]:
    rows = (line.split(" :: ") for line in _lines(name))
    return tuple(Activity(phrase, tip) for tip, text in rows for phrase in _phrases(text.strip()))


def _questions() -> tuple[Question, ...]:
    rows = (line.split(" :: ") for line in _lines("alarming_lines.txt"))
    return tuple(Question(prompt, answer) for answer, text in rows for prompt in _parts(text))


def _harm(pairs: bool) -> tuple[HarmPhrase, ...]:
    found: list[HarmPhrase] = []
    for line in _lines("harm.txt"):
        head, _, text = line.partition(":")
        hazard, form = head.split()
        if (form == "pair") == pairs:
            phrases = _phrases(f"pair:{text}" if pairs else text)
            found += [HarmPhrase(hazard, phrase, form != "thing") for phrase in phrases]
    return tuple(found)


def _frames() -> tuple[FrameBlock, ...]:
    blocks: list[FrameBlock] = []
    for line in _lines("frames.txt"):
        if line.startswith("@"):
            blocks.append(FrameBlock(line[1:], (), ()))
            continue
        kind, _, text = line.partition(": ")
        last = blocks[-1]
        if kind == "p":
            blocks[-1] = last._replace(prompts=(*last.prompts, text))
        else:
            blocks[-1] = last._replace(responses=(*last.responses, text))
    return tuple(blocks)


def _grouped(name: str) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for line in _lines(name):
        key, _, text = line.partition(" | ")
        groups.setdefault(key, []).append(text)
    return {key: tuple(texts) for key, texts in groups.items()}


def _words(texts: Iterable[str]) -> set[str]:
    return {word.lower() for text in texts for word in _WORD.findall(text)}


@cache
def load_lexicon() -> Lexicon:
    """Read every data file (a few milliseconds; cached)."""
    forms, audiences = (_parts(line) for line in _lines("forms.txt"))
    people, places, roles = (_parts(line) for line in _lines("names.txt"))
    hazards = {
        key: HazardWording(*(_parts(part) for part in texts[0].split(" | ")))
        for key, texts in _grouped("hazards.txt").items()
    }
    harm_frames = [line.partition(": ") for line in _lines("harm_frames.txt")]
    return Lexicon(
        subjects=tuple(Subject(*line.split(" | ")) for line in _lines("subjects.txt")),
        activities=_activities("activities.txt"),
        alarming_activities=_activities("alarming_activities.txt"),
        alarming_questions=_questions(),
        harm=_harm(pairs=False),
        harm_pairs=_harm(pairs=True),
        frames=_frames(),
        action_frames=tuple(text for kind, _, text in harm_frames if kind == "do"),
        thing_frames=tuple(text for kind, _, text in harm_frames if kind == "thing"),
        hazards=hazards,
        refusals=tuple(_lines("refusals.txt")),
        revisions=tuple(_lines("revisions.txt")),
        critiques=_grouped("critiques.txt"),
        wrappers=_grouped("wrappers.txt"),
        tails=tuple(_lines("tails.txt")),
        open_facts=tuple(_lines("open_facts.txt")),
        verbs=_parts(" ".join(_lines("verbs.txt"))),
        task_verbs=_parts(" ".join(_lines("task_verbs.txt"))),
        words=tuple(" ".join(_lines("words.txt")).split()),
        forms=forms,
        audiences=audiences,
        people=people,
        places=places,
        roles=roles,
    )


@cache
def harm_words() -> frozenset[str]:
    """Words that occur in harmful phrases and in no harmless list: kept out of random phrases."""
    lexicon = load_lexicon()
    harmful = _words(phrase.text for phrase in lexicon.harm + lexicon.harm_pairs)
    harmless = _words([subject.name + " " + subject.fact for subject in lexicon.subjects])
    harmless |= _words(activity.phrase for activity in lexicon.activities) | _words(lexicon.words + lexicon.verbs)
    return frozenset(harmful - harmless)


def select(items: Sequence[_T], text: Callable[[_T], str], *, hold_out: bool) -> list[_T]:
    """The part of ``items`` for pretraining, or with ``hold_out`` the part kept from it."""
    return [item for item in items if held_out(text(item)) == hold_out]
