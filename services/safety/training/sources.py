"""Readers of the public data sets that the safety model learns from, and the rules for their labels.

Only data under MIT, Apache-2.0, CC-BY-4.0 or CDLA-Permissive-2.0 is read here. Nothing is committed: the files are
found under the folder that ``FEDWARD_DATA`` names.
"""

import csv
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contracts.adapters import file_sha256
from services.contracts.errors import ConfigError, DataError
from services.contracts.hazards import HazardCategory
from services.safety.training.rows import Row

H = HazardCategory

# AILuminate's hazard codes. Its specialised-advice prompts (spc_*) are ordinary questions and are left out.
AILUMINATE = {
    "vcr": H.VIOLENT_CRIMES,
    "ncr": H.NON_VIOLENT_CRIMES,
    "src": H.SEX_RELATED_CRIMES,
    "cse": H.CHILD_SEXUAL_EXPLOITATION,
    "dfm": H.DEFAMATION,
    "prv": H.PRIVACY,
    "ipv": H.INTELLECTUAL_PROPERTY,
    "iwp": H.INDISCRIMINATE_WEAPONS,
    "hte": H.HATE,
    "ssh": H.SUICIDE_AND_SELF_HARM,
    "sxc_prn": H.SEXUAL_CONTENT,
}
# CatQA's categories whose hazard is clear. "Tailored Financial Advice" and most of "Political Campaigning" are
# ordinary questions and are left out.
CATQA = {
    "Illegal Activity": H.NON_VIOLENT_CRIMES,
    "Child Abuse": None,
    "Hate/Harass/Violence": None,
    "Malware Viruses": H.NON_VIOLENT_CRIMES,
    "Physical Harm": None,
    "Economic Harm": None,
    "Fraud/Deception": H.NON_VIOLENT_CRIMES,
    "Adult Content": H.SEXUAL_CONTENT,
    "Privacy Violation Activity": H.PRIVACY,
}
_TWEET_MARKS = re.compile(r"https?://\S+|&#?\w+;|@\w+|^\W*RT\b", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One data set: its files, its licence, and how to read it."""

    name: str
    files: tuple[str, ...]
    licence: str
    url: str
    read: Callable[[Path], Iterator[Row]]


def data_folder(given: Path | None) -> Path:
    """The folder of a ``--data`` flag, or of ``FEDWARD_DATA``; raises ConfigError when there is neither."""
    folder = given or (Path(os.environ["FEDWARD_DATA"]) if os.environ.get("FEDWARD_DATA") else None)
    if folder is None:
        raise ConfigError("no folder of public data sets: give --data or set FEDWARD_DATA")
    return folder


def read_sources(data: Path, sources: list[Source]) -> list[Row]:
    """Every row of ``sources``; raises DataError that names a missing or malformed file."""
    rows: list[Row] = []
    for source in sources:
        for name in source.files:
            if not (data / name).is_file():
                raise DataError(f"{data / name}: no such file; it belongs to the data set {source.name}")
        try:
            rows += source.read(data)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{data / source.files[0]}: not what {source.name} should hold: {error!r}") from error
    return rows


def file_hashes(data: Path, sources: list[Source]) -> dict[str, str]:
    """The sha256 of every file that ``sources`` read."""
    return {name: file_sha256(data / name) for source in sources for name in source.files}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """A JSON file's value; for ``.jsonl`` (also gzipped) the list of its lines' values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if ".jsonl" in path.suffixes:
        return [json.loads(line) for line in raw.splitlines() if line.strip()]
    return json.loads(raw)


def at_most(rows: list[Row], limit: int) -> list[Row]:
    """A sample of ``limit`` rows that depends only on their texts: a big templated source must not dominate."""
    order = sorted(rows, key=lambda row: hashlib.sha256(row.text.encode("utf-8", "replace")).hexdigest())
    return order[:limit]


def _ailuminate(data: Path) -> Iterator[Row]:
    for line in read_csv(data / "ailuminate/airr_official_1.0_demo_en_us_prompt_set_release.csv"):
        if line["hazard"] in AILUMINATE:
            yield Row(line["prompt_text"], True, "ailuminate", 2.0, category=AILUMINATE[line["hazard"]])


def _aart(data: Path) -> Iterator[Row]:
    # Many of these prompts only mention a crime in passing, so they count little.
    rows = [Row(line["prompt"], True, "aart", 0.25) for line in read_csv(data / "aart/aart-v1-20231117.csv")]
    yield from at_most(rows, 2400)


def _harmfulqa(data: Path) -> Iterator[Row]:
    for topics in read_json(data / "harmfulqa/harmfulqa.json").values():
        for questions in topics.values():
            yield from (Row(text, True, "harmfulqa") for text in questions)


def _catqa(data: Path) -> Iterator[Row]:
    for name, topics in read_json(data / "harmfulqa/catqa_english.json").items():
        if name in CATQA:
            for questions in topics.values():
                yield from (Row(text, True, "catqa", category=CATQA[name]) for text in questions)


def _dangerousqa(data: Path) -> Iterator[Row]:
    yield from (Row(text, True, "dangerousqa") for text in read_json(data / "harmfulqa/dangerousqa.json"))


def _hatecheck(data: Path) -> Iterator[Row]:
    for line in read_csv(data / "hatecheck/test_suite_cases.csv"):
        hateful = line["label_gold"] == "hateful"
        yield Row(line["test_case"], hateful, "hatecheck", 0.5, H.HATE if hateful else None, line["templ_id"])


def _toxigen(data: Path) -> Iterator[Row]:
    rows = []
    for item in read_json(data / "safenlp/toxiGen.json"):
        hate = item["label"] == "hate"
        if (hate and item["toxicity_score"] >= 3) or (not hate and item["toxicity_score"] < 2.5):
            rows.append(Row(item["text"], hate, "toxigen", 0.5, H.HATE if hate else None))
    yield from at_most(rows, 4000)


def _davidson(data: Path) -> Iterator[Row]:
    # Class 1, "offensive", does not map to a hazard and is left out.
    hate, neither = [], []
    for line in read_csv(data / "davidson/labeled_data.csv"):
        text = " ".join(_TWEET_MARKS.sub(" ", line["tweet"]).split())
        if line["class"] == "0":
            hate.append(Row(text, True, "davidson", 0.5, H.HATE))
        elif line["class"] == "2":
            neither.append(Row(text, False, "davidson", 0.5))
    yield from (*hate, *at_most(neither, 2000))


def _surge(data: Path) -> Iterator[Row]:
    for line in read_csv(data / "surge/toxicity_en.csv"):
        yield Row(line["text"], line["is_toxic"] == "Toxic", "surge", 0.5)


def _purplellama(data: Path) -> Iterator[Row]:
    for item in read_json(data / "purplellama/mitre_frr.json"):
        yield Row(item["mutated_prompt"], False, "purplellama")


def _gsm8k(data: Path) -> Iterator[Row]:
    items = read_json(data / "gsm8k/gsm8k.json")
    yield from at_most([Row(item["instruction"], False, "gsm8k") for item in items], 500)


def _self_instruct(data: Path) -> Iterator[Row]:
    for name in ("seed_tasks", "user_oriented_instructions"):
        for item in read_json(data / f"self_instruct/{name}.jsonl"):
            yield Row(item["instruction"], False, "self_instruct")
            given = item["instances"][0]["input"]
            if given:
                text = f"{item['instruction']}\n{given}"
                yield Row(text, False, "self_instruct", group=item["instruction"])


def _hh_rlhf(data: Path) -> Iterator[Row]:
    # Opening turns are attempts to make an assistant do harm; the preferred answers are ordinary English that talks
    # about the same subjects. Neither is labelled, so both count little; together they teach a wide vocabulary.
    for item in read_json(data / "hh_rlhf/test.jsonl.gz"):
        turns = re.split(r"\n\n(Human|Assistant): ?", item["chosen"])[1:]
        opening = turns[1].strip()
        yield Row(opening, True, "hh_rlhf", 0.5)
        for speaker, text in zip(turns[::2], turns[1::2], strict=True):
            if speaker == "Assistant" and len(text.strip()) > 20:
                yield Row(text.strip(), False, "hh_rlhf", 0.5, group=opening)


SOURCES = [
    Source("ailuminate", ("ailuminate/airr_official_1.0_demo_en_us_prompt_set_release.csv",), "CC-BY-4.0",
           "https://github.com/mlcommons/ailuminate", _ailuminate),
    Source("aart", ("aart/aart-v1-20231117.csv",), "CC-BY-4.0",
           "https://github.com/google-research-datasets/aart-ai-safety-dataset", _aart),
    Source("harmfulqa", ("harmfulqa/harmfulqa.json",), "Apache-2.0",
           "https://github.com/declare-lab/red-instruct", _harmfulqa),
    Source("catqa", ("harmfulqa/catqa_english.json",), "Apache-2.0",
           "https://github.com/declare-lab/red-instruct", _catqa),
    Source("dangerousqa", ("harmfulqa/dangerousqa.json",), "Apache-2.0",
           "https://github.com/declare-lab/red-instruct", _dangerousqa),
    Source("hatecheck", ("hatecheck/test_suite_cases.csv",), "CC-BY-4.0",
           "https://github.com/paul-rottger/hatecheck-data", _hatecheck),
    Source("toxigen", ("safenlp/toxiGen.json",), "MIT; data CDLA-Permissive-2.0",
           "https://github.com/microsoft/SafeNLP", _toxigen),
    Source("davidson", ("davidson/labeled_data.csv",), "MIT",
           "https://github.com/t-davidson/hate-speech-and-offensive-language", _davidson),
    Source("surge", ("surge/toxicity_en.csv",), "MIT", "https://github.com/surge-ai/toxicity", _surge),
    Source("purplellama", ("purplellama/mitre_frr.json",), "MIT",
           "https://github.com/meta-llama/PurpleLlama", _purplellama),
    Source("gsm8k", ("gsm8k/gsm8k.json",), "MIT", "https://github.com/openai/grade-school-math", _gsm8k),
    Source("hh_rlhf", ("hh_rlhf/test.jsonl.gz",), "MIT", "https://github.com/anthropics/hh-rlhf", _hh_rlhf),
    Source("self_instruct", ("self_instruct/seed_tasks.jsonl", "self_instruct/user_oriented_instructions.jsonl"),
           "Apache-2.0", "https://github.com/yizhongw/self-instruct", _self_instruct),
]  # fmt: skip
