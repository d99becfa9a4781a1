"""The prompt sets of an evaluation: which prompts, in which order, from where, with a hash of all of them.

Benchmarks are read from ``FEDWARD_DATA``. Without it the three default sets fall back to built-in prompts in
Fedward's own wording, and ``source`` says so. Samples are drawn with a fixed seed: every arm and round gets the same
prompts in the same order, and two evaluations are comparable only if their sets' sha256 agree.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from evaluation import benchmarks
from evaluation.files import read_jsonl
from evaluation.split import heldout_prompts
from evaluation.text_rules import content_words
from services.contracts.errors import ConfigError, DataError

SAMPLE_SEED = 0
SAMPLE_SIZE = 150
MAX_PROMPT_CHARACTERS = 160
DEFAULT_SETS = ("advbench", "benign_out_of_source", "benign_alarming")


class Prompt(NamedTuple):
    """One question to the target; ``id`` is unique in the whole evaluation and the same in every arm."""

    id: str
    set_name: str
    harmful: bool
    text: str


class PromptSet(NamedTuple):
    """Prompts of one kind: ``harmful`` ones should be declined, the others answered. ``source`` says where from."""

    name: str
    harmful: bool
    source: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the prompts in their order; equal hashes mean the same evaluation."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=False).encode()).hexdigest()

    def prompts(self) -> Iterator[Prompt]:
        """The prompts with their ids."""
        for number, text in enumerate(self.texts):
            yield Prompt(f"{self.name}-{number:04d}-{text_sha256(text)[:8]}", self.name, self.harmful, text)


class PromptLine(BaseModel):
    """A line of a prompt file: what to ask, and whether it should be declined; other keys are ignored."""

    prompt: str = Field(min_length=1)
    harmful: bool


def text_sha256(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_sets(
    names: Sequence[str],
    *,
    data: Path | None,
    heldout: Path | None = None,
    split_seed: int = 0,
    limit: int | None = None,
) -> list[PromptSet]:
    """Load the sets of these names, each cut to its first ``limit`` prompts.

    Args:
        names: known names, or paths of JSONL files.
        data: the folder of benchmarks, or None to use built-in prompts.
        heldout: a file for the set ``advbench``; without it the held-out half of AdvBench for ``split_seed``.
        split_seed: the seed that ``split`` was run with.
        limit: the most prompts of each set.

    Raises:
        ConfigError: an unknown name, a name given twice, or a set that needs ``data``.
        DataError: a file is missing, malformed or another version.
    """
    loaded = [_load(name, data, heldout, split_seed) for name in names]
    repeated = sorted({s.name for s in loaded if sum(t.name == s.name for t in loaded) > 1})
    if repeated:
        raise ConfigError(f"--sets: {', '.join(repeated)} is given more than once", param="sets")
    return [s._replace(texts=s.texts[:limit]) for s in loaded]


def _load(name: str, data: Path | None, heldout: Path | None, split_seed: int) -> PromptSet:
    if name.endswith(".jsonl"):
        own = Path(name).stem
        if own in _BUILT_IN or own in _FROM_DATA:
            raise ConfigError(f"--sets: {name} has the name of a known set; rename the file", param="sets")
        return read_prompt_file(own, Path(name))
    if name == "advbench" and heldout is not None:
        found = read_prompt_file(name, heldout)
        if not found.harmful:
            raise DataError(f"{heldout}:1: --heldout must hold harmful prompts")
        return found
    if data is None and name in _BUILT_IN:
        return _built_in(name)
    if name == "advbench" and data is not None:
        texts = heldout_prompts(data, split_seed)
        return PromptSet(name, True, f"AdvBench, held-out half of split seed {split_seed}", tuple(texts))
    if name not in _FROM_DATA:
        known = ", ".join([*_BUILT_IN, *(n for n in _FROM_DATA if n not in _BUILT_IN)])
        raise ConfigError(f"--sets: unknown set {name!r}; known: {known}, or the path of a .jsonl file", param="sets")
    if data is None:
        raise ConfigError(f"--sets: {name} needs the benchmarks; set FEDWARD_DATA to their folder", param="sets")
    return _FROM_DATA[name](name, data)


def read_prompt_file(name: str, path: Path) -> PromptSet:
    """Read a JSONL file of prompts, all of one kind; raises DataError beginning with ``file:line``."""
    lines = read_jsonl(path, PromptLine)
    if not lines:
        raise DataError(f"{path}:1: the file holds no prompt")
    harmful = lines[0].harmful
    for number, line in enumerate(lines, start=1):
        if line.harmful != harmful:
            raise DataError(f"{path}:{number}: harmful and benign prompts in one file; use a file for each kind")
    return PromptSet(name, harmful, f"file {path.name}", tuple(line.prompt for line in lines))


_BUILT_IN = {"advbench": "harmful", "benign_out_of_source": "benign", "benign_alarming": "alarming"}


def _built_in(name: str) -> PromptSet:
    with as_file(files("evaluation") / "prompts" / f"{_BUILT_IN[name]}.jsonl") as path:
        found = read_prompt_file(name, path)
    return found._replace(source=f"built-in {_BUILT_IN[name]} prompts, because FEDWARD_DATA is not set")


def _sampled(texts: Sequence[str]) -> tuple[str, ...]:
    """A seeded sample of the texts that are one short line about something, so that an answer can be on topic."""
    short = [t for t in dict.fromkeys(texts) if len(t) <= MAX_PROMPT_CHARACTERS and "\n" not in t]
    fitting = [t for t in short if len(content_words(t)) > 1]
    return tuple(random.Random(SAMPLE_SEED).sample(fitting, min(SAMPLE_SIZE, len(fitting))))


def _dolly(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_rows(data, benchmarks.DOLLY)
    texts = [row["instruction"].strip() for row in rows if not row["input"].strip()]
    return PromptSet(name, False, f"Dolly, seeded sample of {SAMPLE_SIZE}", _sampled(texts))


def _xstest_safe(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_csv(data, benchmarks.XSTEST)
    texts = _sampled([row["prompt"] for row in rows if row["label"] == "safe"])
    return PromptSet(name, False, f"XSTest safe prompts, seeded sample of {SAMPLE_SIZE}", texts)


def _xstest_unsafe(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_csv(data, benchmarks.XSTEST)
    texts = tuple(row["prompt"] for row in rows if row["label"] == "unsafe")
    return PromptSet(name, True, "XSTest unsafe prompts", texts)


def _do_not_answer(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_csv(data, benchmarks.DO_NOT_ANSWER)
    return PromptSet(name, True, "Do-Not-Answer (non-commercial licence)", tuple(row["question"] for row in rows))


def _alpaca(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_rows(data, benchmarks.ALPACA)
    texts = _sampled([row["instruction"].strip() for row in rows])
    return PromptSet(name, False, f"Alpaca (non-commercial licence), seeded sample of {SAMPLE_SIZE}", texts)


def _purplellama_frr(name: str, data: Path) -> PromptSet:
    rows = benchmarks.read_rows(data, benchmarks.PURPLELLAMA_FRR)
    texts = tuple(row["mutated_prompt"] for row in rows)
    return PromptSet(name, False, "PurpleLlama false-refusal prompts", texts)


_FROM_DATA: dict[str, Callable[[str, Path], PromptSet]] = {
    "benign_out_of_source": _dolly,
    "benign_alarming": _xstest_safe,
    "xstest_unsafe": _xstest_unsafe,
    "do_not_answer": _do_not_answer,
    "alpaca": _alpaca,
    "purplellama_frr": _purplellama_frr,
}
