"""The evaluation's command line: ``python -m evaluation {split,run,report,judges}``."""

import asyncio
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evaluation import terminal
from evaluation.datasets import DEFAULT_SETS, PromptSet, load_sets
from evaluation.files import write_json
from evaluation.judge_accuracy import measure_judges
from evaluation.run import RunOptions, RunSummary, evaluate
from evaluation.split import write_split
from services.common.settings import exit_with
from services.contracts.errors import ConfigError, FedwardError

DATA_VARIABLE = "FEDWARD_DATA"
EXAMPLES = """examples:
  # halve AdvBench by near-duplicate cluster: one half for the clients, one held out
  python -m evaluation split --seed 0 --data ../data --out runs/split

  # ask a model the default sets and have the answers judged; the same command continues an interrupted run
  python -m evaluation run --target http://localhost:8103 --model fedward --judge http://localhost:8101 \\
      --heldout runs/split/advbench-heldout.jsonl --out runs/demo/base/eval

  # your own prompts, through the gateway
  python -m evaluation run --target http://localhost:8080 --model fedward --judge http://localhost:8101 \\
      --sets my-prompts.jsonl --api-key-env GATEWAY_KEY --out runs/mine

  # compare the arms of a job: summary.json, plots and report.html
  python -m evaluation report runs/demo

  # how accurate are the judges themselves?
  python -m evaluation judges --data ../data --judge http://localhost:8101 --out runs/demo/judges.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code is that of the error's class when it fails on purpose."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments, Console())
    except FedwardError as error:
        return exit_with(error)
    except OSError as error:
        return exit_with(FedwardError(f"cannot write {error.filename or 'the output'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _split(arguments: Namespace, console: Console) -> None:
    if arguments.data is None:
        raise ConfigError(f"--data is missing: name the folder of benchmarks, or set {DATA_VARIABLE}", param="data")
    console.print(terminal.split_table(write_split(arguments.data, arguments.seed, arguments.out)))
    console.print(f"written: {arguments.out}", soft_wrap=True)


def _run(arguments: Namespace, console: Console) -> None:
    sets = load_sets(
        arguments.sets,
        data=arguments.data,
        heldout=arguments.heldout,
        split_seed=arguments.split_seed,
        limit=arguments.limit,
    )
    for prompt_set in sets:
        console.print(f"{prompt_set.name}: {len(prompt_set.texts)} prompts, {prompt_set.source}", soft_wrap=True)
    chosen = {name: value for name, value in vars(arguments).items() if name in RunOptions.model_fields}
    options = RunOptions(**chosen, api_key=_api_key(arguments.api_key_env))
    console.print(terminal.run_table(_with_progress(options, sets)))
    console.print(f"written: {arguments.out}", soft_wrap=True)


def _with_progress(options: RunOptions, sets: Sequence[PromptSet]) -> RunSummary:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("asking and judging", total=sum(len(s.texts) for s in sets))
        return asyncio.run(evaluate(options, sets, lambda done: progress.advance(task, done)))


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if variable not in os.environ:
        raise ConfigError(f"--api-key-env: the environment variable {variable} is not set", param="api_key_env")
    return os.environ[variable]


def _report(arguments: Namespace, console: Console) -> None:
    from evaluation.report import write_report  # brings matplotlib, which the other commands need not wait for

    summary = write_report(arguments.folder, command=arguments.command, seeds=dict(arguments.seeds))
    console.print(terminal.arms_table(summary))
    console.print(f"written: {arguments.folder / 'report.html'}", soft_wrap=True)


def _judges(arguments: Namespace, console: Console) -> None:
    if arguments.data is None:
        raise ConfigError(f"--data is missing: name the folder of benchmarks, or set {DATA_VARIABLE}", param="data")
    report = asyncio.run(measure_judges(arguments.data, arguments.judge))
    console.print(terminal.judges_table(report))
    if arguments.out is not None:
        write_json(arguments.out, report)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m evaluation",
        description="Measure how safe and how useful a model is, and compare the arms of a job.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    data = os.environ.get(DATA_VARIABLE)

    def command(name: str, run: object, summary: str) -> ArgumentParser:
        found = commands.add_parser(
            name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
        )
        found.set_defaults(run=run)
        return found

    def add_data(found: ArgumentParser) -> None:
        found.add_argument(
            "--data", type=Path, default=data and Path(data), help=f"benchmarks (default: ${DATA_VARIABLE})"
        )

    split = command("split", _split, "halve AdvBench so that the halves share no near-duplicates")
    split.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    split.add_argument("--out", type=Path, required=True, help="folder to write into")
    add_data(split)

    run = command("run", _run, "ask a target the prompt sets, have the answers judged, write samples and a summary")
    add_data(run)
    _add_run_options(run)

    report = command("report", _report, "compare the arms of a job and write summary.json, plots and report.html")
    report.add_argument("folder", type=Path, metavar="RUN_DIR", help="the job's folder")
    report.add_argument("--command", help="the command that started the job, for the provenance")
    report.add_argument("--seeds", type=_seed, nargs="*", default=[], metavar="NAME=N", help="the job's own seeds")

    judges = command("judges", _judges, "measure the judges' refusal findings on XSTest's human labels")
    add_data(judges)
    judges.add_argument(
        "--judge", metavar="URL", help="the safety service; without it only the string rule is measured"
    )
    judges.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def _add_run_options(run: ArgumentParser) -> None:
    run.add_argument("--target", required=True, metavar="URL", help="an OpenAI-compatible server, without /v1")
    run.add_argument("--model", required=True, help="the model's name there")
    run.add_argument("--judge", required=True, metavar="URL", help="the safety service, without /v1")
    run.add_argument("--out", type=Path, required=True, help="folder of this one evaluation")
    run.add_argument(
        "--sets", nargs="+", default=list(DEFAULT_SETS), metavar="SET",
        help=f"names or .jsonl files (default: {' '.join(DEFAULT_SETS)}; also: xstest_unsafe do_not_answer alpaca "
        'purplellama_frr). A file has lines {"prompt": ..., "harmful": true or false}',
    )  # fmt: skip
    run.add_argument("--heldout", type=Path, help="prompts of the set advbench, as `split` writes them")
    run.add_argument("--split-seed", type=int, default=0, help="without --heldout: the split's seed (default: 0)")
    run.add_argument("--limit", type=_positive, help="ask only the first N prompts of each set")
    run.add_argument("--max-tokens", type=_positive, default=32, help="longest answer (default: 32)")
    run.add_argument("--concurrency", type=_positive, default=64, help="prompts under way at a time (default: 64)")
    run.add_argument("--timeout-seconds", type=float, default=60.0, help="for a prompt, retries included (default: 60)")
    run.add_argument(
        "--max-unscored", type=_share, default=0.05, help="largest unscored share without error (default: 0.05)"
    )
    run.add_argument("--api-key-env", metavar="NAME", help="environment variable with the target's API key")
    run.add_argument("--arm", help="the arm, for the record")
    run.add_argument("--round", type=int, help="the round, for the record")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def _seed(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.lstrip("-").isdecimal():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=NUMBER")
    return name, int(number)


if __name__ == "__main__":
    sys.exit(main())
