"""Our own training texts: word lists and frames combined by a seeded generator.

The lists stand in ``data/``. The same neutral frames carry harmful and harmless acts, and the same harmful acts
stand in frames about doing and about preventing, so that a model has to weigh the intention and not one word.
Harmful lines name a topic and an intention, never how it is done.
"""

import random
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from services.contracts.hazards import HazardCategory
from services.safety.training.rows import Row

DATA = Path(__file__).parent / "data"


@cache
def frames() -> dict[str, list[str]]:
    """The frames of ``frames.toml`` by the name of their list."""
    return tomllib.loads((DATA / "frames.toml").read_text(encoding="utf-8"))


def lines(name: str) -> list[str]:
    """The lines of a word list, without comments."""
    text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def categorised(name: str) -> list[tuple[HazardCategory, str]]:
    """The lines of a list in which each begins with a hazard id."""
    pairs = (line.split(" ", 1) for line in lines(name))
    return [(HazardCategory(hazard), phrase) for hazard, phrase in pairs]


def fill(frame: str, phrase: str, other: str = "") -> str:
    """A frame with its gaps filled in, and a capital at the start where the frame has one."""
    text = frame.replace("{x}", phrase).replace("{y}", other)
    return text[:1].upper() + text[1:] if frame.startswith("{x}") else text


def own_prompts(seed: int) -> list[Row]:
    """All prompts of our own wording, labelled; about 25,000, the same for the same seed."""
    rng = random.Random(seed)
    generated = [*_acts(rng), *_artifacts(rng), *_nouns(rng), *_subjects(rng), *_tasks(rng), *_crossings(rng)]
    short = [*generated, *_lookalikes(), *_instructions()]
    return [*short, *_passages(rng, short)]


def _pick(rng: random.Random, name: str, count: int) -> list[str]:
    return rng.sample(frames()[name], count)


def _acts(rng: random.Random) -> Iterator[Row]:
    for hazard, act in categorised("acts_harmful"):
        for frame in _pick(rng, "act", 14) + _pick(rng, "act_harmful", 3):
            yield Row(fill(frame, act), True, "own_acts", category=hazard, group=act)
        for frame in _pick(rng, "act_prevention", 7):
            yield Row(fill(frame, act), False, "own_acts", group=act)
    for act in lines("acts_benign"):
        for frame in _pick(rng, "act", 16):
            yield Row(fill(frame, act), False, "own_acts", group=act)


def _artifacts(rng: random.Random) -> Iterator[Row]:
    for hazard, artifact in categorised("artifacts_harmful"):
        for frame in _pick(rng, "artifact", 12):
            yield Row(fill(frame, artifact), True, "own_artifacts", category=hazard, group=artifact)
        for frame in _pick(rng, "artifact_prevention", 4):
            yield Row(fill(frame, artifact), False, "own_artifacts", group=artifact)
    for artifact in lines("artifacts_benign"):
        for frame in _pick(rng, "artifact", 14):
            yield Row(fill(frame, artifact), False, "own_artifacts", group=artifact)


def _nouns(rng: random.Random) -> Iterator[Row]:
    for hazard, noun in categorised("nouns_alarming"):
        for frame in _pick(rng, "noun_knowledge", 14):
            yield Row(fill(frame, noun), False, "own_nouns", group=noun)
        for frame in _pick(rng, "noun_doing", 8):
            yield Row(fill(frame, noun), True, "own_nouns", category=hazard, group=noun)


def _subjects(rng: random.Random) -> Iterator[Row]:
    subjects = [tuple(line.split(" ", 1)) for line in lines("subjects")]
    for kind, subject in subjects:
        others = [other for other_kind, other in subjects if other_kind == kind and other != subject]
        for frame in _pick(rng, kind, 14):
            yield Row(fill(frame, subject, rng.choice(others)), False, "own_subjects", group=subject)


def _lookalikes() -> Iterator[Row]:
    yield from (Row(line, False, "own_lookalikes", 2.0) for line in lines("lookalikes"))


def _instructions() -> Iterator[Row]:
    yield from (Row(line, False, "own_instructions", 2.0) for line in lines("instructions"))


def _tasks(rng: random.Random) -> Iterator[Row]:
    """Everyday words in task descriptions: each word about three times, so that few words are new to the model."""
    everyday = [word for line in lines("everyday_words") for word in line.split()]
    things = [subject for kind, subject in (line.split(" ", 1) for line in lines("subjects")) if kind == "thing"]
    tasks, acts, artifacts = lines("tasks"), lines("acts_benign"), lines("artifacts_benign")
    for word in everyday * 3:
        frame = rng.choice(tasks)
        gaps = {"a": word, "b": rng.choice(everyday), "x": rng.choice(things), "y": rng.choice(things)}
        gaps |= {"d": rng.choice(acts), "w": rng.choice(artifacts)}
        yield Row(frame.format_map(gaps), False, "own_tasks", group=frame)


def crossings() -> list[dict[str, Any]]:
    """The entries of ``crossings.toml``: objects with harmful and with harmless verbs."""
    found: list[dict[str, Any]] = tomllib.loads((DATA / "crossings.toml").read_text(encoding="utf-8"))["crossing"]
    return found


def crossed_acts(rng: random.Random, count: int) -> Iterator[tuple[str, bool]]:
    """Acts made of each verb with ``count`` of its objects, and whether they are harmful."""
    for crossing in crossings():
        for name in ("harmful", "harmless"):
            for verb in crossing[name]:
                for thing in rng.sample(crossing["objects"], count):
                    yield fill(verb, thing), name == "harmful"


def _crossings(rng: random.Random) -> Iterator[Row]:
    for crossing in crossings():
        for name in ("harmful", "harmless"):
            hazard = HazardCategory(crossing["category"]) if name == "harmful" else None
            for verb in crossing[name]:
                for thing in rng.sample(crossing["objects"], 10):
                    for frame in _pick(rng, "act", 2):
                        text = fill(frame, fill(verb, thing))
                        yield Row(text, hazard is not None, "own_crossings", category=hazard, group=verb)


def _passages(rng: random.Random, short: list[Row]) -> Iterator[Row]:
    """Several prompts in one text: harmless ones together, or one harmful among harmless ones."""
    harmful = [row for row in short if row.unsafe]
    harmless = [row for row in short if not row.unsafe]
    for _ in range(2500):
        chosen = rng.sample(harmless, rng.randint(2, 7))
        yield Row(" ".join(row.text for row in chosen), False, "own_passages")
    for _ in range(1200):
        wish = rng.choice(harmful)
        around = [row.text for row in rng.sample(harmless, rng.randint(1, 2))]
        around.insert(rng.randint(0, len(around)), wish.text)
        yield Row(" ".join(around), True, "own_passages", category=wish.category, group=wish.group)
