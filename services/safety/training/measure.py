"""Measure the safety model on data it never saw: ``python -m services.safety measure --data $FEDWARD_DATA``.

One table: recall on what is unsafe, false positives on what is safe, precision and F1 where a set has both, with
95 % Wilson intervals. The thresholds are those in the weights; only the last line sets one on the measured data, to
compare with figures of that kind, and says so.
"""

import argparse
import json
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from services.contracts.errors import ConfigError
from services.contracts.verdicts import ClassifyItem, Outcome
from services.safety.classifier import SafetyModel, load_model
from services.safety.training import held_out
from services.safety.training.sources import data_folder
from services.safety.training.wording import frames
from services.safety.weights import SHIPPED, write_manifest

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """One line of the table. Shares are None where the set has no such items."""

    name: str
    threshold: float
    unsafe: int
    safe: int
    recall: float | None
    recall_interval: Interval | None
    false_positives: float | None
    false_positives_interval: Interval | None
    precision: float | None
    f1: float | None


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m services.safety measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $FEDWARD_DATA)")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder of the weights to measure")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--record", action="store_true", help="also put the main figures into the weights' manifest")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.weights)
    lines = measure(model, data_folder(arguments.data))
    print(table(lines))
    if arguments.out:
        _write(arguments.out, model, lines, ["python", "-m", "services.safety", "measure", *argv])
    if arguments.record:
        write_manifest(arguments.weights, model.manifest.model_copy(update={"measured": main_figures(lines)}))
    return 0


def measure(model: SafetyModel, data: Path) -> list[Measurement]:
    """Every line of the table; raises DataError when a set is missing."""
    held_out.require(data)
    refusals = frames()["refuse"]
    advbench, dolly = held_out.advbench(data), held_out.dolly(data)
    ordinary = [pair.prompt for pair in dolly] + held_out.dolly_prompts(data) + held_out.alpaca(data)
    answers = {name: held_out.xstest_answers(data, name) for name in held_out.XSTEST_ANSWERS}
    unsafe_asked = {prompt for prompt, unsafe in held_out.xstest(data) if unsafe}
    all_answers = [pair for pairs in answers.values() for pair in pairs]

    def prompts(name: str, items: Iterable[tuple[str, bool]]) -> Measurement:
        return judged(
            name, model.prompt_threshold, ((model.prompt_score(t) >= model.prompt_threshold, u) for t, u in items)
        )

    def pairs(name: str, items: Iterable[held_out.Pair]) -> Measurement:
        return judged(name, model.response_threshold, ((_unsafe(model, pair), pair.label) for pair in items))

    def refused(name: str, items: Iterable[held_out.Pair]) -> Measurement:
        return judged(
            name, 0.5, ((model.refuses(pair.response), pair.label) for pair in items if pair.response.strip())
        )

    return [
        prompts("AdvBench prompts", ((pair.prompt, True) for pair in advbench)),
        prompts("Do-Not-Answer prompts (many are mild)", ((text, True) for text in held_out.do_not_answer(data))),
        prompts("XSTest prompts", held_out.xstest(data)),
        prompts("Dolly prompts", ((pair.prompt, False) for pair in dolly)),
        prompts("Dolly prompts, second sample", ((text, False) for text in held_out.dolly_prompts(data))),
        prompts("Alpaca prompts", ((text, False) for text in held_out.alpaca(data))),
        prompts(
            "AdvBench and Dolly prompts", [(p.prompt, True) for p in advbench] + [(p.prompt, False) for p in dolly]
        ),
        pairs("AdvBench prompt + its affirmative target", advbench),
        pairs(
            "AdvBench prompt + a refusal of ours",
            (held_out.Pair(pair.prompt, refusals[i % len(refusals)], False) for i, pair in enumerate(advbench)),
        ),
        pairs("Dolly prompt + answer", dolly),
        pairs(
            "XSTest unsafe prompt + answer (unsafe = complied)",
            (
                held_out.Pair(p.prompt, p.response, not p.label)
                for p in all_answers
                if p.prompt in unsafe_asked and p.response.strip()
            ),
        ),
        pairs("Do-Not-Answer + answer (unsafe = people say harmful)", held_out.do_not_answer_answers(data)),
        refused("Refusals: XSTest answers, all models", all_answers),
        *(refused(f"Refusals: XSTest answers, {name}", items) for name, items in answers.items()),
        _at_two_percent(model, [pair.prompt for pair in advbench], ordinary),
    ]


def judged(name: str, threshold: float, results: Iterable[tuple[bool, bool]]) -> Measurement:
    """Summarise (flagged, unsafe) pairs."""
    counts = {(flagged, unsafe): 0 for flagged in (True, False) for unsafe in (True, False)}
    for flagged, unsafe in results:
        counts[bool(flagged), bool(unsafe)] += 1
    hits, false_alarms = counts[True, True], counts[True, False]
    unsafe_count, safe_count = hits + counts[False, True], false_alarms + counts[False, False]
    both = unsafe_count > 0 and safe_count > 0
    return Measurement(
        name=name,
        threshold=threshold,
        unsafe=unsafe_count,
        safe=safe_count,
        recall=hits / unsafe_count if unsafe_count else None,
        recall_interval=wilson(hits, unsafe_count) if unsafe_count else None,
        false_positives=false_alarms / safe_count if safe_count else None,
        false_positives_interval=wilson(false_alarms, safe_count) if safe_count else None,
        precision=hits / max(hits + false_alarms, 1) if both else None,
        f1=2 * hits / max(2 * hits + false_alarms + counts[False, True], 1) if both else None,
    )


def wilson(hits: int, total: int) -> Interval:
    """Wilson's 95 % score interval of a share (Wilson 1927)."""
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def table(lines: Sequence[Measurement]) -> str:
    """The lines as a Markdown table."""
    head = ["set", "unsafe", "safe", "threshold", "recall", "false positives", "precision", "F1"]
    body = [
        [
            line.name, str(line.unsafe), str(line.safe), f"{line.threshold:.3f}",
            _share(line.recall, line.recall_interval), _share(line.false_positives, line.false_positives_interval),
            _share(line.precision, None), _share(line.f1, None),
        ]
        for line in lines
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, rule, *body]
    )


def main_figures(lines: Sequence[Measurement]) -> dict[str, float]:
    """The figures that ``GET /v1/model`` reports."""
    figures: dict[str, float] = {}
    for line in lines:
        for name, value in (("recall", line.recall), ("false_positives", line.false_positives), ("f1", line.f1)):
            if value is not None:
                figures[f"{line.name}: {name}"] = round(value, 4)
    return figures


def _at_two_percent(model: SafetyModel, harmful: list[str], ordinary: list[str]) -> Measurement:
    scores = [model.prompt_score(text) for text in ordinary]
    threshold = float(np.quantile(scores, 0.98))
    results = [(model.prompt_score(text) >= threshold, True) for text in harmful]
    results += [(score >= threshold, False) for score in scores]
    return judged("AdvBench at 2 % of Dolly and Alpaca (threshold set here)", threshold, results)


def _unsafe(model: SafetyModel, pair: held_out.Pair) -> bool:
    return model.classify(ClassifyItem(prompt=pair.prompt, response=pair.response)).outcome is Outcome.UNSAFE


def _share(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else "")


def _write(path: Path, model: SafetyModel, lines: Sequence[Measurement], command: list[str]) -> None:
    summary = {
        "schema_version": 1,
        "command": shlex.join(command),
        "commit": _commit(),
        "model_id": model.manifest.model_id,
        "sha256": model.manifest.sha256,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "hardware": platform.machine(),
        "measurements": [asdict(line) for line in lines],
    }
    try:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the figures: {error.strerror}") from error


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
