"""Permissively licensed data that is read at training time from the data folder and never committed.

Two kinds: ``TRAINING_SOURCES`` may be trained on; ``EVALUATION_ONLY`` are never trained on. AdvBench and XSTest are
read here too, but only to drop training lines that are near-duplicates of their prompts.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from services.contracts.errors import DataError
from trainer.miniature.lexicon import harm_words

NEAR_DUPLICATE_JACCARD = 0.5
MAX_PROMPT_WORDS = 70
EVALUATION_ONLY = ("advbench", "xstest", "do_not_answer", "dolly", "dolly_curiosity", "alpaca")
_STOP_TEXT = """a an the to of for and in on that with how into from is are be can by at as your you i me my it this or
their them who what which without on write create develop provide give make explain describe teach design instruct"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


class Source(NamedTuple):
    """One file of the data folder that may be trained on, and what it is used for."""

    path: str
    licence: str
    use: str


TRAINING_SOURCES = (
    Source("aart/aart-v1-20231117.csv", "CC-BY-4.0", "harmful requests, answered with our refusals"),
    Source("harmfulqa/harmfulqa.json", "Apache-2.0", "harmful questions, answered with our refusals"),
    Source("harmfulqa/catqa_english.json", "Apache-2.0", "harmful questions, answered with our refusals"),
    Source("harmfulqa/dangerousqa.json", "Apache-2.0", "harmful questions, answered with our refusals"),
    Source(
        "ailuminate/airr_official_1.0_demo_en_us_prompt_set_release.csv",
        "CC-BY-4.0",
        "harmful requests (without the specialised-advice hazards), answered with our refusals",
    ),
    Source("gsm8k/gsm8k.json", "MIT", "harmless prompts, ordinary words and phrases"),
    Source("self_instruct/seed_tasks.jsonl", "Apache-2.0", "harmless prompts, ordinary words and phrases"),
    Source("self_instruct/user_oriented_instructions.jsonl", "Apache-2.0", "harmless prompts, words and phrases"),
    Source("purplellama/mitre_frr.json", "MIT", "harmless security requests, ordinary words"),
)


class SourceRecord(NamedTuple):
    """What was read: for the model card."""

    path: str
    sha256: str
    licence: str
    use: str


@dataclass(frozen=True)
class Sources:
    """Prompts and vocabulary from the data folder; everything is empty without one."""

    harmful: tuple[str, ...] = ()
    benign: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    records: tuple[SourceRecord, ...] = ()
    evaluation_prompts: tuple[str, ...] = ()


def content_words(text: str) -> frozenset[str]:
    """Lower-case words of three or more letters without stop words and frame verbs."""
    return frozenset(w for w in re.findall(r"[a-z']+", text.lower()) if len(w) > 2) - _STOP_WORDS


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Shared words over all words; 0 when both are empty."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


class NearDuplicates:
    """Finds texts whose content words overlap an evaluation prompt's by Jaccard >= 0.5."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._sets = [words for words in map(content_words, prompts) if words]
        self._by_word: dict[str, list[int]] = {}
        for index, words in enumerate(self._sets):
            for word in words:
                self._by_word.setdefault(word, []).append(index)

    def matches(self, text: str) -> bool:
        """Whether ``text`` is a near-duplicate of any of the prompts."""
        words = content_words(text)
        shared: Counter[int] = Counter(i for word in words for i in self._by_word.get(word, ()))
        return any(n / (len(words) + len(self._sets[i]) - n) >= NEAR_DUPLICATE_JACCARD for i, n in shared.items())


@cache
def load_sources(folder: Path | None) -> Sources:
    """Read every training source under ``folder``; without a folder, own wording is all there is.

    Raises DataError that names the file when one is missing or malformed.
    """
    if folder is None:
        return Sources()
    harmful, benign = _harmful(folder), _benign(folder)
    evaluation = [row["goal"] for row in _csv(folder / "advbench/harmful_behaviors.csv")]
    evaluation += [row["prompt"] for row in _csv(folder / "xstest/xstest_prompts.csv")]
    duplicates = NearDuplicates(evaluation)
    # Ordinary words of the harmful prompts belong to the open vocabulary too, or they would come to mean harm.
    words = Counter(word for text in benign + harmful for word in re.findall(r"\b[a-z]{3,14}\b", text))
    return Sources(
        harmful=tuple(p for p in harmful if not duplicates.matches(p)),
        benign=tuple(p for p in benign if not duplicates.matches(p)),
        words=tuple(sorted(word for word, n in words.items() if n > 2 and word not in harm_words())),
        phrases=tuple(sorted(set(_phrases(benign)))),
        records=tuple(
            SourceRecord(s.path, hashlib.sha256((folder / s.path).read_bytes()).hexdigest(), s.licence, s.use)
            for s in TRAINING_SOURCES
        ),
        evaluation_prompts=tuple(evaluation),
    )


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read: {error}; set FEDWARD_DATA to a full data folder or unset it") from error


def _json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read: {error}; set FEDWARD_DATA to a full data folder or unset it") from error


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for child in value.values() if isinstance(value, dict) else value:
            yield from _leaves(child)


def _clean(prompts: Iterable[str]) -> list[str]:
    stripped = (" ".join(prompt.split()).strip("\"'") for prompt in prompts)
    return [p for p in dict.fromkeys(stripped) if 2 <= len(p.split()) <= MAX_PROMPT_WORDS]


def _harmful(folder: Path) -> list[str]:
    prompts = [row["prompt"] for row in _csv(folder / "aart/aart-v1-20231117.csv")]
    prompts += _leaves(_json(folder / "harmfulqa/harmfulqa.json"))
    catqa = _json(folder / "harmfulqa/catqa_english.json")
    prompts += _leaves({topic: rows for topic, rows in catqa.items() if "Financial" not in topic})
    prompts += _leaves(_json(folder / "harmfulqa/dangerousqa.json"))
    ailuminate = _csv(folder / "ailuminate/airr_official_1.0_demo_en_us_prompt_set_release.csv")
    prompts += [row["prompt_text"] for row in ailuminate if not row["hazard"].startswith("spc")]
    return _clean(prompts)


def _benign(folder: Path) -> list[str]:
    prompts = [row["instruction"] for row in _json(folder / "gsm8k/gsm8k.json")]
    prompts += [row["mutated_prompt"] for row in _json(folder / "purplellama/mitre_frr.json")]
    for name in ("seed_tasks", "user_oriented_instructions"):
        prompts += [row["instruction"] for row in _json(folder / f"self_instruct/{name}.jsonl")]
    return _clean(prompts)


def _phrases(prompts: Iterable[str]) -> Iterator[str]:
    """Runs of two to five words inside a sentence, for example "the price of two"."""
    for prompt in prompts:
        for sentence in re.split(r"[.,;:?!\"()]", prompt):
            words = sentence.split()
            for start in range(0, len(words) - 2, 4):
                run = words[start : start + 2 + (len(sentence) + start) % 4]
                if len(run) > 1 and not harm_words() & {word.lower() for word in run}:
                    yield " ".join(run)
