"""Train the embedded models: ``python -m services.safety train --data $FEDWARD_DATA``.

Both tiers learn from the same texts. Two whole sources and a tenth of every other group of texts are left out; they
set the thresholds and give the validation figures. Seeds are fixed and one thread does the work, so that the same
data and library versions give the same bytes on the same kind of CPU. The n-gram tier takes five minutes of CPU time,
the encoder forty, or twenty with --bfloat16, which is how the shipped one was trained.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from services.common.files import replace_file
from services.contracts.hazards import HazardCategory
from services.safety.embedded.encoder import load_encoder
from services.safety.embedded.encoder_build import build, find_base
from services.safety.embedded.features import normalise, words
from services.safety.embedded.load import CALIBRATION
from services.safety.embedded.ngram import MODEL_ID, load_ngram
from services.safety.embedded.scores import HEADS, Scorer
from services.safety.embedded.weights import SHIPPED, Array, Manifest, read_weights, write_manifest, write_weights
from services.safety.training.answers import Answer, answers_to, instruction_answers, ordinary_answers, own_answers
from services.safety.training.contrast import contrast_rows
from services.safety.training.encoder import Recipe, fit
from services.safety.training.exchanges import exchange_answers
from services.safety.training.fitting import SEED
from services.safety.training.heads import Heads
from services.safety.training.held_out import benchmark_texts, require
from services.safety.training.near_duplicates import NearDuplicates
from services.safety.training.rows import Row, is_held_out
from services.safety.training.samples import Sample, training_samples
from services.safety.training.sources import SOURCES, data_folder, file_hashes, read_sources
from services.safety.training.validation import content_shift, shipped_calibration, validate
from services.safety.training.wording import own_prompts

ENCODER_ID = "fedward-safety-encoder-1"
HELD_OUT_PERCENT = 10
WHOLE_SOURCES = ("self_instruct", "dangerousqa")  # training sees none of these
STATEMENTS = ("hatecheck", "toxigen", "davidson", "surge", "contrast_statements")  # content, not requests


class Table(NamedTuple):
    """All texts of training and validation."""

    rows: list[Row]
    answers: list[Answer]

    def seen(self) -> "Table":
        """The part that is trained on."""
        return Table(
            [row for row in self.rows if not is_unseen(row.source, row.key)],
            [answer for answer in self.answers if not is_unseen(answer.source, answer.key)],
        )

    def unseen(self) -> "Table":
        """The part that is not."""
        return Table(
            [row for row in self.rows if is_unseen(row.source, row.key)],
            [answer for answer in self.answers if is_unseen(answer.source, answer.key)],
        )


def main(argv: Sequence[str]) -> int:
    """Train, write the weights, print a summary."""
    parser = argparse.ArgumentParser(prog="python -m services.safety train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $FEDWARD_DATA)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for the weights of both tiers")
    parser.add_argument("--tier", choices=("both", "ngram", "encoder"), default="both")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the encoder's training")
    parser.add_argument("--epochs", type=float, default=Recipe.epochs, help="of the encoder's training")
    parser.add_argument("--no-contrast", action="store_true", help="leave the contrast corpus out (an ablation)")
    parser.add_argument("--bfloat16", action="store_true", help="twice as fast on CPUs that have it")
    arguments = parser.parse_args(argv)
    data = data_folder(arguments.data)
    table = read_table(data, contrast=not arguments.no_contrast)
    manifests = []
    if arguments.tier != "encoder":
        manifests.append(train_ngram(table, data, arguments.out / "ngram"))
    if arguments.tier != "ngram":
        recipe = Recipe(seed=arguments.seed, epochs=arguments.epochs, bfloat16=arguments.bfloat16)
        manifests.append(train_encoder(table, data, arguments.out / "encoder", recipe))
    for manifest in manifests:
        for name, value in manifest.validation.items():
            print(f"{name:48s} {value:.4f}")
        print(f"{sum(manifest.rows.values())} texts; {manifest.model_id} has sha256 {manifest.sha256}")
    return 0


def read_table(data: Path, *, contrast: bool = True) -> Table:
    """Every text, without those that nearly repeat a benchmark's; raises DataError when a data file is missing."""
    require(data)
    benchmarks = NearDuplicates(benchmark_texts(data))
    rows = prompt_rows(data, benchmarks, contrast=contrast)
    return Table(rows, answer_rows(data, rows, benchmarks))


def train_ngram(table: Table, data: Path, out: Path) -> Manifest:
    """Train the n-gram tier and write its weights, manifest and calibration."""
    seen = table.seen()
    heads = Heads.fit(seen.rows, seen.answers)
    shift = content_shift(heads.scorer(), data)
    write_weights(out, heads.tensors(), heads.metadata(shift), _manifest(MODEL_ID, [*seen.rows, *seen.answers], data))
    return _finish(load_ngram(out), table.unseen(), data, out)


def train_encoder(table: Table, data: Path, out: Path, recipe: Recipe) -> Manifest:
    """Train the encoder tier and write its adapter, manifest and calibration."""
    torch.set_num_threads(1)
    samples = [sample for sample in training_samples(*table) if not is_unseen(sample.source, sample.group)]
    tensors = fit(samples, find_base(), recipe).tensors()
    metadata = {"categories": ",".join(HazardCategory), **{name: str(value) for name, value in asdict(recipe).items()}}
    manifest = _manifest(ENCODER_ID, samples, data)
    with tempfile.TemporaryDirectory() as scratch:
        scorer = _built(Path(scratch), tensors, metadata, manifest)
        tensors["head.bias"][HEADS.index("content")] += content_shift(scorer, data)
        write_weights(out, tensors, metadata, manifest)
        scorer = _built(Path(scratch), tensors, metadata, manifest)
        return _finish(scorer, table.unseen(), data, out)


def is_unseen(source: str, key: str) -> bool:
    """Whether training leaves a text out, by its source and its group."""
    return source.removeprefix("answers_") in WHOLE_SOURCES or is_held_out(key, HELD_OUT_PERCENT)


def prompt_rows(data: Path, benchmarks: NearDuplicates, *, contrast: bool = True) -> list[Row]:
    """All rows of the prompt head: each text once, none that nearly repeats a benchmark's."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    own = [*own_prompts(SEED), *(contrast_rows(SEED) if contrast else [])]
    for row in [*read_sources(data, SOURCES), *own]:
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
    own = [*own_answers(SEED), *exchange_answers()]
    answers = [*statements, *own, *answers_to(public), *ordinary_answers(data), *replies]
    return [answer for answer in answers if not benchmarks.repeats(answer.text)]


def _manifest(model_id: str, seen: Sequence[Row | Answer | Sample], data: Path) -> Manifest:
    counts = Counter(text.source for text in seen)
    return Manifest(
        model_id=model_id, sha256="0" * 64, data_sha256=file_hashes(data, SOURCES), rows=dict(sorted(counts.items()))
    )


def _built(folder: Path, tensors: dict[str, Array], metadata: dict[str, str], manifest: Manifest) -> Scorer:
    """The tier as it would be served: int8, by ONNX Runtime."""
    written = write_weights(folder / "weights", tensors, metadata, manifest)
    build(folder / "weights", folder / "built")
    return load_encoder(folder / "built", written.sha256)


def _finish(scorer: Scorer, unseen: Table, data: Path, out: Path) -> Manifest:
    """Calibrate on what training did not see, and put the validation figures into the manifest."""
    calibration = shipped_calibration(scorer, data, unseen.rows)
    replace_file(out / CALIBRATION, (calibration.model_dump_json(indent=2) + "\n").encode())
    figures = validate(scorer, calibration.points["balanced"], unseen.rows, unseen.answers)
    manifest = read_weights(out).manifest.model_copy(update={"validation": figures})
    write_manifest(out, manifest)
    return manifest
