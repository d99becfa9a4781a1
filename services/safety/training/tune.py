"""``python -m services.safety tune``: fine-tune the encoder tier on an operator's own labelled data.

A classifier of general harm misses what only this operator calls unsafe: the paper's guard found 0.5 % of such rows as
released and 73.7 % after tuning (arXiv 2502.16691). The heads and the LoRA adapter go on from the shipped ones, with as
many sentences of our own mixed in, so that they do not forget other harm. Part of the data is held out: half of it to
choose thresholds for the old and the new model, half to compare them there.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from services.contracts.errors import ConfigError
from services.contracts.verdicts import Accuracy
from services.safety.calibration import Calibration
from services.safety.embedded.classifier import EmbeddedClassifier
from services.safety.embedded.encoder import load_encoder
from services.safety.embedded.encoder_build import build, find_base
from services.safety.embedded.load import CALIBRATION, load_classifier
from services.safety.embedded.weights import SHIPPED, Manifest, WeightsFile, read_weights, write_weights
from services.safety.training.calibrate import FALSE_POSITIVES, by_kind, calibrate, measure_point, write_calibration
from services.safety.training.calibrate_report import COLUMNS, cells, markdown_table, warnings
from services.safety.training.encoder import Recipe, fit
from services.safety.training.judging import verdicts_of
from services.safety.training.labelled import KINDS, Kind, Labelled, LabelledFile, read_labelled, require_both_classes
from services.safety.training.tune_data import Parts, replay, samples_of, split

LEARNING_RATE = 5e-4  # half of the first training's: there is something to keep
BATCH = 16
EPOCHS = 3.0
HELD_OUT = 0.3
EXAMPLES = """\
examples:
  python -m services.safety tune --labelled own.jsonl --out tuned
  python -m services.safety tune --labelled own.jsonl --out tuned --epochs 5 --held-out 0.4
  python -m services.safety --tier encoder --weights tuned --encoder tuned/built

The labelled file is that of `python -m services.safety calibrate`; a few hundred lines are a good beginning. Only the
encoder tier can be tuned: the n-gram tier cannot be trained further, and a guard model is tuned where it comes from.
"""


class Tested(NamedTuple):
    """A classifier's calibration, what is wrong with that, and how its balanced point does on the items for testing."""

    calibration: Calibration
    warnings: list[str]
    accuracy: dict[Kind, Accuracy | None]


class Comparison(NamedTuple):
    """The model to start from and the tuned one, on the same parts of the data."""

    parts: Parts
    before: Tested
    after: Tested


def main(argv: Sequence[str]) -> int:
    """Tune, calibrate, compare, write the weights folder."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety tune",
        description="Fine-tune the encoder tier (and no other) on labelled data, and compare it with what it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--labelled", type=Path, required=True, help="JSONL of labelled items")
    parser.add_argument("--out", type=Path, required=True, help="weights folder to write")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="times that the training part is gone through")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, help="share of prompts to calibrate and compare on")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="weights folder to start from")
    parser.add_argument("--base", type=Path, help="folder with the base encoder (default: the pip package, or the Hub)")
    arguments = parser.parse_args(argv)
    print(summary(tune(**vars(arguments))))
    print(f"  python -m services.safety --tier encoder --weights {arguments.out} --encoder {arguments.out / 'built'}")
    return 0


def tune(
    *, labelled: Path, out: Path, weights: Path, base: Path | None, epochs: float, seed: int, held_out: float
) -> Comparison:
    """Tune, calibrate and compare; write the tuned weights folder.

    Args:
        labelled: the operator's file.
        out: the folder to write: ``encoder`` (weights, manifest, calibration) and ``built`` (what serves them).
        weights: the folder to start from.
        base: a folder with the base encoder; by default the pip package, else the Hub.
        epochs: how often the training part is gone through.
        seed: of the split and of the training.
        held_out: the share of prompts that is not trained on.

    Raises:
        ConfigError: a number is out of range, or the weights to start from are not there.
        DataError: the file is malformed, or too small to hold both labels in every part.
    """
    if not 0.0 < held_out < 1.0 or epochs <= 0.0:
        raise ConfigError("0 < --held-out < 1 and --epochs > 0 must hold")
    if out.resolve() == weights.resolve():
        raise ConfigError(f"--out {out} is the folder to start from; give another, so that both can be compared")
    file = read_labelled(labelled)
    parts = split(file.items, held_out, seed)
    for name, items in parts._asdict().items():
        require_both_classes(items, f"{labelled}, the part to {name} ({len(items)} of {len(file.items)})")
    folder = find_base(base)
    start = read_weights(weights / "encoder")
    write_tuned(out, parts.train, file, start, tuning_recipe(len(parts.train), start, epochs, seed), folder)
    comparison = compare(weights, out, parts, file, folder)
    write_calibration(out / "encoder" / CALIBRATION, comparison.after.calibration)
    return comparison


def tuning_recipe(items: int, start: WeightsFile, epochs: float, seed: int) -> Recipe:
    """How so many items are learnt, going on from an adapter; raises ConfigError when it is no adapter."""
    ranks = {tensor.shape[0] for name, tensor in start.tensors.items() if name.endswith(".lora_A")}
    if len(ranks) != 1:
        raise ConfigError(f"the weights of {start.manifest.model_id} are not those of an encoder's adapter")
    warm_up = max(1, round(epochs * items / BATCH / 10))
    return Recipe(seed, epochs, BATCH, LEARNING_RATE, rank=ranks.pop(), warm_up_steps=warm_up)


def write_tuned(
    out: Path, items: Sequence[Labelled], file: LabelledFile, start: WeightsFile, recipe: Recipe, base: Path
) -> None:
    """Train on the items; write the weights to ``out/encoder`` and the model that serves them to ``out/built``."""
    samples = samples_of(items)
    tensors = fit([*samples, *replay(len(samples), recipe.seed)], base, recipe, start.tensors).tensors()
    metadata = start.metadata | {"tuned_from": start.manifest.sha256, "tuned_seed": str(recipe.seed)}
    manifest = Manifest(
        model_id=f"{start.manifest.model_id}-tuned",
        sha256="0" * 64,
        data_sha256={file.name: file.sha256},
        rows={"labelled": len(items)},
    )
    write_weights(out / "encoder", tensors, metadata, manifest)
    build(out / "encoder", out / "built", base)


def compare(weights: Path, out: Path, parts: Parts, file: LabelledFile, base: Path) -> Comparison:
    """Calibrate and measure the model to start from and the tuned one."""
    with tempfile.TemporaryDirectory() as scratch:
        build(weights / "encoder", Path(scratch), base)
        former = load_classifier("encoder", weights=weights, encoder=Path(scratch))
        before = tested(former, parts, file)
    scorer = load_encoder(out / "built", read_weights(out / "encoder").manifest.sha256)
    tuned = EmbeddedClassifier(scorer, Calibration.unmeasured(scorer.model_id, scorer.sha256, former.point))
    return Comparison(parts, before, tested(tuned, parts, file))


def tested(classifier: EmbeddedClassifier, parts: Parts, file: LabelledFile) -> Tested:
    """Calibrate a classifier on one part and measure it on the other."""
    info = classifier.info()
    fitted = verdicts_of(classifier, parts.calibrate)
    calibration = calibrate(
        parts.calibrate,
        fitted,
        info,
        data=f"{file.name}, the {len(parts.calibrate)} items held out to calibrate on",
        data_sha256=file.sha256,
        current=Calibration.unmeasured(info.model_id, info.sha256, classifier.point),
    )
    found = measure_point(
        calibration.points["balanced"], by_kind(parts.test, verdicts_of(classifier, parts.test)), hazards={}
    )
    problems = list(warnings(calibration, by_kind(parts.calibrate, fitted), FALSE_POSITIVES))
    return Tested(calibration, problems, {"prompt": found.prompt, "response": found.response})


def summary(comparison: Comparison) -> str:
    """The table of both models, and what to do with the result."""
    parts, before, after = comparison
    body = []
    for kind in KINDS:
        for name, one in (("before", before), ("tuned", after)):
            point = one.calibration.points["balanced"]
            threshold = point.prompt_threshold if kind == "prompt" else point.response_threshold
            figures = one.accuracy[kind]
            if figures is not None:
                body.append([f"{kind}s", name, f"{figures.unsafe}+{figures.safe}", f"{threshold:.4g}", *cells(figures)])
    head = ["of", "model", "unsafe+safe", "threshold", *COLUMNS]
    absent = [kind for kind in KINDS if after.accuracy[kind] is None]
    notes = [f"WARNING: no {kind}s in the data: their threshold stays that of the model before" for kind in absent]
    return "\n".join(
        [
            f"trained on {len(parts.train)} items and as many sentences of our own; each model at its own balanced",
            f"point, chosen on {len(parts.calibrate)} items, measured on {len(parts.test)} others; 95 % intervals",
            "",
            markdown_table(head, body),
            "",
            *after.warnings,
            *notes,
            "Tuning can make a model forget other harm: compare `python -m services.safety measure` with the same",
            "flags before you serve it:",
            "",
        ]
    )
