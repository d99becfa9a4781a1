"""``python -m services.safety band``: choose which scores of the embedded model a cascade sends to its guard model.

The embedded classifier and the guard model both judge every labelled item. From their verdicts follows what a cascade
with any band would find, and at which price: the share of items that the guard model has to be asked about.
"""

import argparse
import asyncio
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import Progress

from services.common.files import replace_file
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError, UpstreamUnavailable
from services.contracts.verdicts import ClassifierInfo, Outcome, Verdict
from services.safety.assemble import embedded_classifier, guard_backend
from services.safety.backends import Backend, Band
from services.safety.calibration import PointName
from services.safety.embedded.load import Tier
from services.safety.guard.families import FAMILIES
from services.safety.settings import SafetySettings
from services.safety.training.band_curve import Cases, Step, curve, narrowest
from services.safety.training.band_report import report, write_plot
from services.safety.training.figures import UNSCORED, Bools
from services.safety.training.judging import verdicts_of
from services.safety.training.labelled import KINDS, Kind, Labelled, read_labelled

PROGRAM = "python -m services.safety"
SHARES = [percent / 100 for percent in range(101)]
GAIN = 0.9
SERVICE_FLAGS = (
    "tier", "weights", "encoder", "calibration", "operating_point",
    "guard_family", "guard_url", "guard_model", "guard_template", "guard_calibration",
)  # fmt: skip
EXAMPLES = """\
examples:
  python -m services.safety band --labelled own.jsonl --guard-family llama-guard \\
    --guard-url http://vllm:8000 --guard-model meta-llama/Llama-Guard-3-8B --plot band.png
  python -m services.safety band --labelled own.jsonl --tier ngram --share 0.05 --guard-family generic \\
    --guard-url http://vllm:8000 --guard-model Qwen/Qwen3-4B-Instruct-2507

The lines of the labelled file are those of `python -m services.safety calibrate`. The guard's other settings are the
service's own environment variables: FEDWARD_SAFETY_GUARD_API_KEY, ..._GUARD_TIMEOUT_SECONDS, ..._GUARD_CONCURRENCY.
"""


class BandFile(BaseModel):
    """What is written: both models, the data, the curve, and the step to run, which is None when none is of use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    command: str
    embedded: ClassifierInfo
    guard: ClassifierInfo
    data: str
    data_sha256: str
    rows: int
    unscored_by_embedded: int
    unscored_by_guard: int
    gain: float | None  # the wanted share of the F1 gain; None when a share of items was given
    curve: list[Step]
    chosen: Step | None


def main(argv: Sequence[str]) -> int:
    """Ask both models about the labelled data, print the curve, write the band."""
    arguments = _parser().parse_args(argv)
    for name, share in (("share", arguments.share), ("gain", arguments.gain)):
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"--{name} {share} is not in (0, 1]", param=name)
    settings = _settings(arguments)
    file = read_labelled(arguments.labelled)
    guard, classifier = guard_backend(settings), embedded_classifier(settings)
    second = asyncio.run(ask_guard(guard, file.items, settings.guard_concurrency))
    first = verdicts_of(classifier, file.items)
    cases = cases_of(file.items, first, second, classifier.info())
    steps, chosen = choose(cases, arguments.gain, arguments.share)
    found = BandFile(
        command=f"{PROGRAM} band {shlex.join(argv)}",
        embedded=classifier.info(),
        guard=guard.info(),
        data=file.name,
        data_sha256=file.sha256,
        rows=len(file.items),
        unscored_by_embedded=sum(verdict.outcome is Outcome.UNSCORED for verdict in first),
        unscored_by_guard=sum(verdict.outcome is Outcome.UNSCORED for verdict in second),
        gain=None if arguments.share else arguments.gain,
        curve=steps,
        chosen=chosen,
    )
    print(_headline(found), report(cases, rows_of_kinds(file.items), steps, chosen), sep="\n\n")
    if arguments.plot:
        write_plot(arguments.plot, steps, chosen, f"{found.embedded.model_id} > {found.guard.model_id}")
    _write(arguments.out, found)
    if chosen and chosen.band:
        print(f"wrote {arguments.out}; next: run the service with the band\n")
        print(f"  {service_command(settings, found.embedded.tier, chosen.band)}")
    return 0


async def ask_guard(guard: Backend, items: Sequence[Labelled], at_a_time: int) -> list[Verdict]:
    """The guard model's verdicts, one for each item, in order; it is let go of at the end.

    Raises:
        UpstreamUnavailable: it cannot be asked at all. A single question that fails gives an ``unscored`` verdict.
    """
    verdicts: dict[int, Verdict] = {}
    rest = iter(enumerate(items))
    try:
        if reason := await guard.ready():
            raise UpstreamUnavailable(guard.info().model_id, f"is not ready: {reason}")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("asking the guard model", total=len(items))

            async def ask() -> None:
                for number, item in rest:
                    (verdicts[number],) = await guard.classify([item.conversation])
                    progress.advance(task)

            await asyncio.gather(*(ask() for _ in range(at_a_time)))
    finally:
        await guard.aclose()
    return [verdicts[number] for number in range(len(items))]


def cases_of(
    items: Sequence[Labelled], first: Sequence[Verdict], second: Sequence[Verdict], info: ClassifierInfo
) -> Cases:
    """Both models' verdicts on the items; whatever is not safe, ``unscored`` included, is a flag.

    Args:
        items: with both labels among them.
        first: the embedded model's verdicts.
        second: the guard model's.
        info: the embedded model, for its thresholds.
    """
    of_response = info.threshold if info.response_threshold is None else info.response_threshold
    thresholds = {"prompt": info.threshold, "response": of_response}
    return Cases(
        scores=np.array([UNSCORED if verdict.score is None else verdict.score for verdict in first], float),
        thresholds=np.array([thresholds[item.kind] for item in items], float),
        first=np.array([verdict.outcome is not Outcome.SAFE for verdict in first], bool),
        second=np.array([verdict.outcome is not Outcome.SAFE for verdict in second], bool),
        unsafe=np.array([item.unsafe for item in items], bool),
    )


def choose(cases: Cases, gain: float, share: float | None) -> tuple[list[Step], Step | None]:
    """The curve, and the step on it to run.

    Args:
        cases: what both models say.
        gain: how much of the possible F1 gain is wanted, when no share is given.
        share: how much of the items may be sent.

    Raises:
        ConfigError: that share is not one item.
    """
    if share is None:
        steps = curve(cases, SHARES)
        return steps, narrowest(steps, gain)
    steps = curve(cases, sorted({*SHARES, share}))
    chosen = next(step for step in steps if step.at_most == share)
    if chosen.band is None:
        raise ConfigError(f"--share {share:g}: of {len(cases.scores)} items no band sends so few", param="share")
    return steps, chosen


def rows_of_kinds(items: Sequence[Labelled]) -> dict[Kind, Bools]:
    """Which items (n,) are prompts, and which responses, where there are any."""
    rows = {kind: np.array([item.kind == kind for item in items], bool) for kind in KINDS}
    return {kind: chosen for kind, chosen in rows.items() if chosen.any()}


def service_command(settings: SafetySettings, tier: str, band: Band) -> str:
    """How to run the service as it was measured here; the guard's API key is left to the environment.

    Args:
        settings: as measured.
        tier: what the embedded model says of itself; ``auto`` may take another one elsewhere, whose scores differ.
        band: the chosen one.
    """
    name_of_tier = "encoder" if tier.startswith("encoder") else "ngram"
    flags = ["--backend", "cascade", "--tier", name_of_tier, "--band", f"[{band.low!r}, {band.high!r}]"]
    for name in SERVICE_FLAGS[1:]:
        value = getattr(settings, name)
        if value is not None and value != SafetySettings.model_fields[name].default:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*PROGRAM.split(), *flags])


def _headline(found: BandFile) -> str:
    lines = [
        f"{found.embedded.model_id} ({found.embedded.operating_point}) > {found.guard.model_id} on {found.data}, "
        f"{found.rows} items; intervals are at 95 %"
    ]
    for model, unscored in ((found.embedded, found.unscored_by_embedded), (found.guard, found.unscored_by_guard)):
        if unscored:
            lines.append(f"WARNING: {model.model_id} left {unscored} of {found.rows} unscored; they count as flagged")
    return "\n".join(lines)


def _settings(arguments: argparse.Namespace) -> SafetySettings:
    """The service's settings from the flags, and from its environment variables where there is no flag."""
    given = {name: value for name in SERVICE_FLAGS if (value := getattr(arguments, name)) is not None}
    try:
        return SafetySettings(backend="cascade", **given)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} band",
        description="Choose the uncertain band of a cascade on labelled data: what is sent against what is gained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--labelled", type=Path, required=True, help="JSONL of labelled items")
    parser.add_argument("--out", type=Path, default=Path("band.json"), help="file to write")
    parser.add_argument("--plot", type=Path, help="also draw the curve into this PNG file (needs matplotlib)")
    parser.add_argument("--gain", type=float, default=GAIN, help="wanted share of the possible F1 gain (default: .9)")
    parser.add_argument("--share", type=float, help="in place of --gain: send at most this share of the items")
    parser.add_argument("--tier", choices=get_args(Tier), help="embedded model")
    parser.add_argument("--weights", type=Path, help="folder of the embedded models' weights")
    parser.add_argument("--encoder", type=Path, help="folder of the built encoder")
    parser.add_argument("--calibration", type=Path, help="calibration file of the embedded model")
    parser.add_argument("--operating-point", choices=get_args(PointName), help="of both models")
    parser.add_argument("--guard-family", required=True, choices=FAMILIES, help="how the guard model is asked")
    parser.add_argument("--guard-url", help="its OpenAI-compatible server")
    parser.add_argument("--guard-model", required=True, help="its name there; without a URL a Hub name or folder")
    parser.add_argument("--guard-template", type=Path, help="prompt file for the families wildguard and generic")
    parser.add_argument("--guard-calibration", type=Path, help="calibration file of the guard model")
    return parser


def _write(path: Path, found: BandFile) -> None:
    try:
        replace_file(path, (found.model_dump_json(indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the band: {error.strerror}") from error
