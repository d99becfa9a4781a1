"""The sets that the safety model is measured on and never trained on, and how they are read.

AdvBench, XSTest, Do-Not-Answer, Dolly and Alpaca. Their texts are also what training texts are compared with, so
that no near-duplicate of them is learned (:mod:`services.safety.training.near_duplicates`).
"""

from pathlib import Path
from typing import NamedTuple

from services.contracts.errors import DataError
from services.safety.training.sources import read_csv, read_json

ADVBENCH = "advbench/harmful_behaviors.csv"
XSTEST = "xstest/xstest_prompts.csv"
XSTEST_ANSWERS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
DO_NOT_ANSWER = "do_not_answer/data_en.csv"
DO_NOT_ANSWER_MODELS = ("GPT4", "ChatGPT", "Claude", "ChatGLM2", "llama2-7b-chat", "vicuna-7b")
DOLLY = "dolly/dolly_3k.json"
DOLLY_PROMPTS = ("dolly_curiosity/databrick-1024-2.jsonl", "dolly_curiosity/databrick-1024-3.jsonl")
ALPACA = "alpaca/alpaca.json"


class Pair(NamedTuple):
    """A prompt with a response and one label (what it means depends on the reader)."""

    prompt: str
    response: str
    label: bool


def require(data: Path) -> None:
    """Check that every file is there; raises DataError that names those that are not."""
    answers = [f"xstest/xstest_v2_completions_{model}.csv" for model in XSTEST_ANSWERS]
    names = [ADVBENCH, XSTEST, *answers, DO_NOT_ANSWER, DOLLY, *DOLLY_PROMPTS, ALPACA]
    missing = [name for name in names if not (data / name).is_file()]
    if missing:
        raise DataError(f"{data}: missing {', '.join(missing)}; --data takes the folder of the public data sets")


def benchmark_texts(data: Path) -> list[str]:
    """Every prompt of every set, and AdvBench's targets."""
    texts = [text for pair in advbench(data) for text in (pair.prompt, pair.response)]
    texts += [text for text, _ in xstest(data)] + do_not_answer(data)
    return texts + [pair.prompt for pair in dolly(data)] + dolly_prompts(data) + alpaca(data)


def advbench(data: Path) -> list[Pair]:
    """AdvBench's harmful goals with their affirmative targets; all unsafe."""
    return [Pair(line["goal"], line["target"], True) for line in read_csv(data / ADVBENCH)]


def xstest(data: Path) -> list[tuple[str, bool]]:
    """XSTest's prompts and whether they are unsafe."""
    return [(line["prompt"], line["label"] == "unsafe") for line in read_csv(data / XSTEST)]


def xstest_answers(data: Path, model: str) -> list[Pair]:
    """One model's answers to XSTest; the label says whether people called it a full or a partial refusal."""
    lines = read_csv(data / f"xstest/xstest_v2_completions_{model}.csv")
    return [Pair(line["prompt"], line["completion"], line["final_label"] != "1_full_compliance") for line in lines]


def do_not_answer(data: Path) -> list[str]:
    """Do-Not-Answer's questions; many are mild."""
    return [line["question"] for line in read_csv(data / DO_NOT_ANSWER)]


def do_not_answer_answers(data: Path) -> list[Pair]:
    """Six models' answers to Do-Not-Answer; the label says whether people called the answer harmful."""
    return [
        Pair(line["question"], line[f"{model}_response"], line[f"{model}_harmful"] == "1")
        for line in read_csv(data / DO_NOT_ANSWER)
        for model in DO_NOT_ANSWER_MODELS
        if line[f"{model}_response"].strip()
    ]


def dolly(data: Path) -> list[Pair]:
    """Dolly's instructions, with their input below, and answers; all harmless."""
    items = read_json(data / DOLLY)
    return [
        Pair(f"{item['instruction']}\n{item['input']}" if item["input"] else item["instruction"], item["output"], False)
        for item in items
        if item["output"].strip()
    ]


def dolly_prompts(data: Path) -> list[str]:
    """Another sample of Dolly: prompts only."""
    return [str(item["attacker_prompt"]) for name in DOLLY_PROMPTS for item in read_json(data / name)]


def alpaca(data: Path) -> list[str]:
    """Alpaca's instructions."""
    return [str(item["instruction"]) for item in read_json(data / ALPACA) if item["instruction"].strip()]
