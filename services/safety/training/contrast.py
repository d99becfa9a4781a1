"""Our own contrast corpus: the same alarming word with harmful and with harmless intent.

A model that reacts to words flags "shoot a portrait" and "stab at the crossword" alike. Every entry of
``data/contrast/*.toml`` therefore holds one word on both sides: acts (verb phrases) and whole prompts that mean harm,
and acts and prompts that do not. The frames of ``data/contrast/frames.toml`` carry both sides, turn a harmful act
harmless (history, prevention, law, reporting, film), or keep it harmful in disguise. Harmful lines name a topic and an
intention, never how it is done.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from services.safety.training.contrast_files import FOLDER, Corpus, Entry, Statement, read_corpus
from services.safety.training.rows import Row
from services.safety.training.wording import fill

WISHES, DISGUISED, TURNED, PLAIN = 2, 1, 1, 2  # frames of each harmful act (three kinds) and of each harmless one
LONG_PER_ENTRY = 2  # of each label
CASUAL_SHARE = 0.1  # of the rows lose their capitals and their last stop, as hurried people write

Frames = dict[str, tuple[str, ...]]


def contrast_rows(seed: int, folder: Path = FOLDER) -> list[Row]:
    """The corpus: every text once, the same rows for the same seed and files.

    Raises:
        DataError: a file is missing or malformed; the message names the file and the entry.
    """
    rng = random.Random(seed)
    corpus = read_corpus(folder)
    rows = [
        *(row for entry in corpus.entries for row in _acts(rng, entry, corpus.frames)),
        *(row for entry in corpus.entries for row in _prompts(rng, entry, corpus.frames)),
        *_long(rng, corpus),
        *(row for number, statement in enumerate(corpus.statements) for row in _statements(number, statement)),
    ]
    return list({row.text.lower(): row for row in (_casual(rng, row) for row in rows)}.values())


def _acts(rng: random.Random, entry: Entry, frames: Frames) -> Iterator[Row]:
    """Harmful acts stay harmful in neutral and disguised frames and become harmless in turned ones."""
    for act in entry.harmful:
        wishes = rng.sample(frames["neutral"], WISHES) + rng.sample(frames["disguised"], DISGUISED)
        yield from (entry.row(fill(frame, act), True, "contrast_acts") for frame in wishes)
        turned = rng.sample(frames["turned"], TURNED)
        yield from (entry.row(fill(frame, act), False, "contrast_acts") for frame in turned)
    for act in entry.harmless:
        plain = rng.sample(frames["neutral"], PLAIN)
        yield from (entry.row(fill(frame, act), False, "contrast_acts") for frame in plain)


def _prompts(rng: random.Random, entry: Entry, frames: Frames) -> Iterator[Row]:
    """Whole prompts as they are, and with neutral sentences around them: always for the harmful, else for half."""
    for prompt in entry.harmful_prompts:
        yield entry.row(prompt, True, "contrast_prompts")
        yield entry.row(_in_context(rng, prompt, frames), True, "contrast_prompts")
    for prompt in entry.harmless_prompts:
        yield entry.row(prompt, False, "contrast_prompts")
        if rng.random() < 0.5:
            yield entry.row(_in_context(rng, prompt, frames), False, "contrast_prompts")


def _in_context(rng: random.Random, prompt: str, frames: Frames) -> str:
    """The prompt with one or two neutral sentences before it, or one after it, or both."""
    before = rng.sample(frames["before"], rng.randint(0, 2))
    after = rng.sample(frames["after"], 1 if not before else rng.randint(0, 1))
    return " ".join([*before, prompt, *after])


def _long(rng: random.Random, corpus: Corpus) -> Iterator[Row]:
    """Several harmless prompts in one text, or one harmful prompt among them.

    The companions come from the entry's own decile, so that a split keeps all texts of an entry on one side.
    """
    pools: dict[int, list[str]] = {}
    for entry in corpus.entries:
        pools.setdefault(entry.decile(), []).extend(entry.harmless_prompts)
    for entry in corpus.entries:
        pool = pools[entry.decile()]
        for _ in range(LONG_PER_ENTRY):
            wish = [rng.choice(entry.harmful_prompts)]
            around = rng.sample(pool, min(len(pool), rng.randint(1, 4)))
            yield entry.row(_joined(rng, wish + around), True, "contrast_long")
            chosen = rng.sample(pool, min(len(pool), rng.randint(1, 4)))
            yield entry.row(_joined(rng, [rng.choice(entry.harmless_prompts), *chosen]), False, "contrast_long")


def _joined(rng: random.Random, prompts: list[str]) -> str:
    """The different prompts in any order, as one paragraph or line by line."""
    shuffled = rng.sample(sorted(set(prompts)), len(set(prompts)))
    return rng.choice((" ", " ", "\n", "\n\n")).join(shuffled)


def _statements(number: int, statement: Statement) -> Iterator[Row]:
    """Statements as they are; those about one subject stand on one side of a split."""
    group = f"contrast statement {number}"
    for text in statement.harmful:
        yield Row(text, True, "contrast_statements", category=statement.category, group=group)
    for text in statement.harmless:
        yield Row(text, False, "contrast_statements", group=group)


def _casual(rng: random.Random, row: Row) -> Row:
    return replace(row, text=row.text.lower().rstrip(".?!")) if rng.random() < CASUAL_SHARE else row
