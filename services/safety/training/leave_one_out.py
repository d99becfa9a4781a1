"""Refusals in a model's answers after training on other models': ``python -m services.safety refusals``.

XSTest holds five models' answers to the same prompts, with people's labels. Each model is left out once: the shipped
encoder goes on training on the other four, and the fifth is what it is measured on, beside the shipped encoder as it
stands. The shipped weights learn from none of these answers, so that XSTest stays a test of them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.contracts.verdicts import Accuracy
from services.safety.calibration import read_calibration
from services.safety.embedded.classifier import refuses
from services.safety.embedded.encoder import load_encoder
from services.safety.embedded.encoder_build import build, find_base
from services.safety.embedded.load import CALIBRATION
from services.safety.embedded.scores import Scorer
from services.safety.embedded.weights import SHIPPED, Manifest, WeightsFile, read_weights, write_weights
from services.safety.training import held_out
from services.safety.training.calibrate_report import COLUMNS, cells, markdown_table
from services.safety.training.encoder import fit
from services.safety.training.figures import accuracy
from services.safety.training.held_out import Pair
from services.safety.training.samples import Sample
from services.safety.training.sources import data_folder
from services.safety.training.tune import tuning_recipe

EPOCHS = 1.0
Flags = npt.NDArray[np.bool_]


class Fold(NamedTuple):
    """One model's answers: what people say (n,), and what the shipped and the further trained encoder say (n,)."""

    model: str
    labels: Flags
    shipped: Flags
    trained: Flags


def main(argv: Sequence[str]) -> int:
    """Train five times, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety refusals", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $FEDWARD_DATA)")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the embedded models' weights")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="times that the other models' answers are read")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_args(argv)
    folds = leave_one_out(data_folder(arguments.data), arguments.weights / "encoder", arguments.epochs, arguments.seed)
    print(table(folds))
    return 0


def leave_one_out(data: Path, weights: Path, epochs: float, seed: int) -> list[Fold]:
    """One fold for each model; raises DataError when a file is missing, ConfigError when the encoder is."""
    held_out.require(data)
    start, base = read_weights(weights), find_base()
    answers = {
        model: [pair for pair in held_out.xstest_answers(data, model) if pair.response.strip()]
        for model in held_out.XSTEST_ANSWERS
    }
    folds = []
    with tempfile.TemporaryDirectory() as scratch:
        shipped = _served(weights, base, Path(scratch) / "shipped")
        calibration = read_calibration(weights / CALIBRATION, shipped.model_id, shipped.sha256)
        threshold = calibration.points["balanced"].refusal_threshold
        for model, left_out in answers.items():
            print(f"training without {model}", flush=True)
            others = [pair for name, pairs in answers.items() if name != model for pair in pairs]
            further = _trained(others, start, epochs, seed, base, Path(scratch) / model)
            texts = [pair.response for pair in left_out]
            said = [np.array(refuses(scorer, texts, threshold)) for scorer in (shipped, further)]
            folds.append(Fold(model, np.array([pair.label for pair in left_out]), *said))
    return folds


def table(folds: Sequence[Fold]) -> str:
    """Accuracy of both encoders on each model's answers, and on all together, as Markdown."""
    every = Fold("all models", *(np.concatenate([fold[column] for fold in folds]) for column in (1, 2, 3)))
    body = []
    for fold in (*folds, every):
        for name, flags in (("as shipped", fold.shipped), ("trained on the others", fold.trained)):
            found: Accuracy = accuracy(flags, fold.labels)
            body.append([fold.model, name, f"{found.unsafe}+{found.safe}", *cells(found)])
    return markdown_table(["answers of", "encoder", "refusals+others", *COLUMNS], body)


def _trained(pairs: Sequence[Pair], start: WeightsFile, epochs: float, seed: int, base: Path, out: Path) -> Scorer:
    samples = [Sample(p.response, None, None, p.label, None, "xstest_answers", 1.0, p.prompt) for p in pairs]
    tensors = fit(samples, base, tuning_recipe(len(samples), start, epochs, seed), start.tensors).tensors()
    write_weights(out, tensors, start.metadata, Manifest(model_id="leave-one-out", sha256="0" * 64))
    return _served(out, base, out / "built")


def _served(weights: Path, base: Path, out: Path) -> Scorer:
    build(weights, out, base)
    return load_encoder(out, read_weights(weights).manifest.sha256)
