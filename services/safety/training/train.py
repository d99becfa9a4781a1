"""Train the safety model: ``python -m services.safety train --data $FEDWARD_DATA --out services/safety/weights``.

Two passes. The first leaves whole sources and a part of every other source out, measures on them, and sets the
thresholds: Self-Instruct, which people wrote for another purpose, says what 2 % false positives means. The second
trains on everything and keeps those thresholds. Seeds are fixed and one thread does the work, so that the same data
and library versions give the same bytes.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from services.safety.classifier import MODEL_ID
from services.safety.features import normalise, words
from services.safety.training.answers import Answer, answers_to, instruction_answers, ordinary_answers, own_answers
from services.safety.training.fitting import SEED
from services.safety.training.heads import Heads
from services.safety.training.held_out import benchmark_texts, require
from services.safety.training.near_duplicates import NearDuplicates
from services.safety.training.rows import Row
from services.safety.training.sources import SOURCES, data_folder, file_hashes, read_sources
from services.safety.training.validation import calibrate, validate
from services.safety.training.wording import own_prompts
from services.safety.weights import SHIPPED, Manifest, write_weights

HELD_OUT_PERCENT = 10
WHOLE_SOURCES = ("self_instruct", "dangerousqa", "catqa")  # the first pass sees none of these
STATEMENTS = ("hatecheck", "toxigen", "davidson", "surge")  # content, not requests


def main(argv: Sequence[str]) -> int:
    """Train, write the weights, print a summary."""
    parser = argparse.ArgumentParser(prog="python -m services.safety train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $FEDWARD_DATA)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for the weights and their manifest")
    arguments = parser.parse_args(argv)
    manifest = train(data_folder(arguments.data), arguments.out)
    for name, value in manifest.validation.items():
        print(f"{name:48s} {value:.4f}")
    print(f"{sum(manifest.rows.values())} prompts; wrote {arguments.out}; sha256 {manifest.sha256}")
    return 0


def train(data: Path, out: Path) -> Manifest:
    """Train both passes and write the weights to ``out``; raises DataError when a data file is missing."""
    require(data)
    benchmarks = NearDuplicates(benchmark_texts(data))
    rows = prompt_rows(data, benchmarks)
    answers = answer_rows(data, rows, benchmarks)
    first = Heads.fit([r for r in rows if not unseen(r)], [a for a in answers if not unseen(a.content_row())])
    unseen_answers = [answer for answer in answers if unseen(answer.content_row())]
    calibration = calibrate(first, data, unseen_answers)
    validation = validate(first.model(calibration), [row for row in rows if unseen(row)], unseen_answers)
    final = Heads.fit(rows, answers)
    manifest = Manifest(
        model_id=MODEL_ID,
        sha256="0" * 64,
        data_sha256=file_hashes(data, SOURCES),
        rows=dict(sorted(Counter(row.source for row in rows).items())),
        validation=validation,
    )
    return write_weights(out, final.tensors(), final.metadata(calibration), manifest)


def unseen(row: Row) -> bool:
    """Whether the first pass leaves this row out."""
    return row.source.removeprefix("answers_") in WHOLE_SOURCES or row.held_out(HELD_OUT_PERCENT)


def prompt_rows(data: Path, benchmarks: NearDuplicates) -> list[Row]:
    """All rows of the prompt head: each text once, none that nearly repeats a benchmark's."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for row in read_sources(data, SOURCES) + own_prompts(SEED):
        key = tuple(words(normalise(row.text)))
        if key and key not in seen and not benchmarks.repeats(row.text):
            seen.add(key)
            kept.append(row)
    return kept


def answer_rows(data: Path, rows: list[Row], benchmarks: NearDuplicates) -> list[Answer]:
    """All rows of the heads that read responses; none that nearly repeats a benchmark's."""
    statements = [Answer(r.text, r.unsafe, False, r.source, r.weight, r.group) for r in rows if r.source in STATEMENTS]
    replies = [answer for _, answer in instruction_answers(data)]
    public = [row for row in rows if not row.source.startswith("own_")]
    answers = [*statements, *own_answers(SEED), *answers_to(public), *ordinary_answers(data), *replies]
    return [answer for answer in answers if not benchmarks.repeats(answer.text)]
