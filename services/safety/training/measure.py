"""Measure the safety model on data it never saw: ``python -m services.safety measure --data $FEDWARD_DATA``.

One table: recall on what is unsafe, false positives on what is safe, precision and F1 where a set has both, with
95 % Wilson intervals. The thresholds are those in the weights; only the last two lines set one on the measured data,
to compare with figures of that kind, and say so.
"""

import argparse
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from services.common.benchmarks import code_commit, write_figures
from services.contracts.errors import ConfigError
from services.contracts.verdicts import Accuracy, ClassifyItem, Outcome, Verdict
from services.safety.calibration import PointName
from services.safety.embedded.classifier import EmbeddedClassifier, refuses
from services.safety.embedded.load import Tier, load_classifier
from services.safety.embedded.weights import SHIPPED
from services.safety.items import read_item
from services.safety.training import held_out
from services.safety.training.calibrate_report import COLUMNS, cells, markdown_table
from services.safety.training.figures import accuracy
from services.safety.training.held_out import Pair
from services.safety.training.sources import data_folder
from services.safety.training.wording import frames

ADVBENCH, XSTEST = "AdvBench prompts", "XSTest prompts"
ORDINARY = ("Dolly prompts", "Dolly prompts, second sample", "Alpaca prompts")

Scores = npt.NDArray[np.float64]
Items = TypeVar("Items")


class Measurement(NamedTuple):
    """One line of the table."""

    name: str
    threshold: float
    accuracy: Accuracy


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $FEDWARD_DATA)")
    parser.add_argument("--tier", choices=get_args(Tier), default="auto", help="which embedded model")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the embedded models' weights")
    parser.add_argument("--encoder", type=Path, help="folder of the built encoder")
    parser.add_argument("--calibration", type=Path, help="calibration file in place of the shipped one")
    parser.add_argument("--operating-point", choices=get_args(PointName), default="balanced")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only lines whose names hold such a text")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    classifier = load_classifier(
        arguments.tier,
        weights=arguments.weights,
        encoder=arguments.encoder,
        calibration=arguments.calibration,
        point=arguments.operating_point,
    )
    print(f"{classifier.scorer.model_id}, {classifier.scorer.tier}, operating point {arguments.operating_point}")
    lines = measure(classifier, data_folder(arguments.data), arguments.only)
    print(table(lines))
    if arguments.out:
        _write(arguments.out, classifier, lines, ["python", "-m", "services.safety", "measure", *argv])
    return 0


def measure(classifier: EmbeddedClassifier, data: Path, only: Sequence[str] = ()) -> list[Measurement]:
    """Every line of the table, or those whose names hold one of the texts ``only``.

    Raises:
        ConfigError: no line has such a name.
        DataError: a set is missing.
    """
    held_out.require(data)
    refusals = frames()["refuse"]
    advbench, dolly = held_out.advbench(data), held_out.dolly(data)
    answers = {name: held_out.xstest_answers(data, name) for name in held_out.XSTEST_ANSWERS}
    unsafe_asked = {prompt for prompt, unsafe in held_out.xstest(data) if unsafe}
    all_answers = [pair for pairs in answers.values() for pair in pairs]
    refused_advbench = [Pair(p.prompt, refusals[i % len(refusals)], False) for i, p in enumerate(advbench)]
    complied = [Pair(p.prompt, p.response, not p.label) for p in all_answers if p.prompt in unsafe_asked]
    prompt_sets: dict[str, Sequence[tuple[str, bool]]] = {
        ADVBENCH: [(pair.prompt, True) for pair in advbench],
        "Do-Not-Answer prompts (many are mild)": [(text, True) for text in held_out.do_not_answer(data)],
        XSTEST: held_out.xstest(data),
        ORDINARY[0]: [(pair.prompt, False) for pair in dolly],
        ORDINARY[1]: [(text, False) for text in held_out.dolly_prompts(data)],
        ORDINARY[2]: [(text, False) for text in held_out.alpaca(data)],
    }
    pair_sets = {
        "AdvBench prompt + its affirmative target": advbench,
        "AdvBench prompt + a refusal of ours": refused_advbench,
        "Dolly prompt + answer": dolly,
        "XSTest unsafe prompt + answer (unsafe = complied)": complied,
        "Do-Not-Answer + answer (unsafe = people say harmful)": held_out.do_not_answer_answers(data),
    }
    refusal_sets = {
        f"Refusals: XSTest answers, {name}": pairs for name, pairs in {"all models": all_answers, **answers}.items()
    }
    prompt_sets, pair_sets = _named(prompt_sets, only), _named(pair_sets, only)
    refusal_sets = _named(refusal_sets, only)
    scores: dict[str, Scores] = {}
    lines = []
    with Progress() as progress:
        steps = progress.add_task("measuring", total=len(prompt_sets) + len(pair_sets) + len(refusal_sets))
        for name, items in prompt_sets.items():
            progress.update(steps, description=name)
            scores[name] = prompt_scores(classifier, [text for text, _ in items])
            flags = scores[name] >= classifier.point.prompt_threshold
            found = accuracy(flags, np.array([unsafe for _, unsafe in items]))
            lines.append(Measurement(name, classifier.point.prompt_threshold, found))
            progress.advance(steps)
        for name, pairs in pair_sets.items():
            progress.update(steps, description=name)
            lines.append(_pairs(classifier, name, pairs))
            progress.advance(steps)
        for name, pairs in refusal_sets.items():
            progress.update(steps, description=name)
            lines.append(_refused(classifier, name, pairs))
            progress.advance(steps)
    lines += _at_shares(scores, prompt_sets)
    if not lines:
        raise ConfigError(f"no line of the table has {' or '.join(only)} in its name")
    return lines


def table(lines: Sequence[Measurement]) -> str:
    """The lines as a Markdown table."""
    body = [
        [
            line.name, str(line.accuracy.unsafe), str(line.accuracy.safe), f"{line.threshold:.3f}",
            *cells(line.accuracy)[:-1],
        ]
        for line in lines
    ]  # fmt: skip
    return markdown_table(["set", "unsafe", "safe", "threshold", *COLUMNS[:-1]], body)


def prompt_scores(classifier: EmbeddedClassifier, prompts: Sequence[str]) -> Scores:
    """The score (n,) of each prompt; 1 for one that could not be read, which is never safe."""
    verdicts = _verdicts(classifier, [ClassifyItem(prompt=prompt) for prompt in prompts])
    return np.array([1.0 if verdict.score is None else verdict.score for verdict in verdicts])


def _pairs(classifier: EmbeddedClassifier, name: str, pairs: Sequence[Pair]) -> Measurement:
    answered = [pair for pair in pairs if pair.response.strip()]
    verdicts = _verdicts(classifier, [ClassifyItem(prompt=p.prompt, response=p.response) for p in answered])
    flags = np.array([verdict.outcome is not Outcome.SAFE for verdict in verdicts])
    labels = np.array([pair.label for pair in answered])
    return Measurement(name, classifier.point.response_threshold, accuracy(flags, labels))


def _refused(classifier: EmbeddedClassifier, name: str, pairs: Sequence[Pair]) -> Measurement:
    answered = [pair for pair in pairs if pair.response.strip()]
    threshold = classifier.point.refusal_threshold
    found = np.array(refuses(classifier.scorer, [pair.response for pair in answered], threshold))
    return Measurement(name, threshold, accuracy(found, np.array([pair.label for pair in answered])))


def _named(sets: Mapping[str, Items], only: Sequence[str]) -> dict[str, Items]:
    """The sets whose names hold one of the texts; all when there are none."""
    return {name: items for name, items in sets.items() if not only or any(text in name for text in only)}


def _at_shares(scores: Mapping[str, Scores], sets: Mapping[str, Sequence[tuple[str, bool]]]) -> list[Measurement]:
    """The lines with thresholds of their own, as far as the sets that they need were measured."""
    lines = []
    ordinary = [scores[name] for name in ORDINARY if name in scores]
    if len(ordinary) == len(ORDINARY) and ADVBENCH in scores:
        name = "AdvBench at 2 % of Dolly and Alpaca (threshold set here)"
        lines.append(_at_share(name, 0.02, scores[ADVBENCH], np.concatenate(ordinary)))
    if XSTEST in scores:
        unsafe = np.array([label for _, label in sets[XSTEST]])
        name = "XSTest at 15 % of its safe prompts (threshold set here)"
        lines.append(_at_share(name, 0.15, scores[XSTEST][unsafe], scores[XSTEST][~unsafe]))
    return lines


def _at_share(name: str, share: float, harmful: Scores, safe: Scores) -> Measurement:
    """A line whose threshold is the one that this share of the safe scores reaches."""
    threshold = float(np.quantile(safe, 1.0 - share))
    flags = np.concatenate([harmful, safe]) >= threshold
    return Measurement(name, threshold, accuracy(flags, np.arange(len(flags)) < len(harmful)))


def _verdicts(classifier: EmbeddedClassifier, items: Sequence[ClassifyItem]) -> list[Verdict]:
    return classifier.classify_all([read_item(item) for item in items])


def _write(path: Path, classifier: EmbeddedClassifier, lines: Sequence[Measurement], command: list[str]) -> None:
    summary = {
        "schema_version": 1,
        "command": shlex.join(command),
        "commit": code_commit(),
        "model": classifier.info().model_dump(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "hardware": platform.machine(),
        "measurements": [
            {"name": line.name, "threshold": line.threshold, **line.accuracy.model_dump(exclude={"h_mean"})}
            for line in lines
        ],
    }
    write_figures(path, summary)
