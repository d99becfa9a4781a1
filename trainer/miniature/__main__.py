"""Command line of the miniature model.

Examples::

    python -m trainer.miniature                            # pretrain and write models/miniature (`make miniature`)
    python -m trainer.miniature --steps 400 --out /var/tmp/trial
    python -m trainer.miniature probe --model models/miniature
    python -m trainer.miniature probe --development        # development sets only; leaves the final ones unseen
    python -m trainer.miniature corpus --kind harmful -n 200 --seed 7 --out harmful.jsonl

The data folder comes from --data or the environment variable FEDWARD_DATA; without one the corpus is own wording only.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from services.contracts.errors import ConfigError, FedwardError
from trainer.files import make_dir, write_atomically
from trainer.miniature.corpus import benign_pairs, harmful_pairs, red_team_prompts

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = ROOT / "models" / "miniature"


def parser() -> argparse.ArgumentParser:
    """All flags; without a command the model is pretrained."""
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--data", type=Path, default=_data_from_environment(), help="data folder (default: $FEDWARD_DATA)"
    )
    main_parser = argparse.ArgumentParser(
        prog="python -m trainer.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[data],
    )
    main_parser.add_argument("--steps", type=_positive, default=3_000, help="training steps (default: %(default)s)")
    main_parser.add_argument("--seed", type=int, default=0, help="seed of weights and corpus (default: %(default)s)")
    main_parser.add_argument(
        "--out", type=Path, default=DEFAULT_MODEL, help="folder to write (default: models/miniature)"
    )
    main_parser.add_argument(
        "--processes", type=_positive, default=2, help="CPU processes of one thread each (default: %(default)s)"
    )
    commands = main_parser.add_subparsers(dest="command", metavar="{probe,corpus}")

    probe = commands.add_parser("probe", parents=[data], help="measure a model folder on prompts it never saw")
    probe.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model folder (default: models/miniature)")
    probe.add_argument("-n", type=_positive, default=200, help="prompts per own set (default: %(default)s)")
    probe.add_argument("--development", action="store_true", help="development sets instead of the final ones")

    corpus = commands.add_parser("corpus", parents=[data], help="write prompt/response pairs as JSONL")
    corpus.add_argument("--kind", choices=("benign", "harmful", "red-team"), required=True)
    corpus.add_argument("-n", type=_positive, default=100, help="number of pairs (default: %(default)s)")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--alarming-share", type=float, default=0.2, help="benign pairs with alarming words")
    corpus.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        _check_data(options.data)
        if options.command == "corpus":
            _write_corpus(options)
        elif options.command == "probe":
            from trainer.miniature.probe import run_probe  # torch takes seconds to load, and corpus needs none

            run_probe(options.model, options.data, options.n, development=options.development)
        else:
            from trainer.miniature.pretrain import Recipe, pretrain

            pretrain(
                Recipe(steps=options.steps, seed=options.seed, processes=options.processes), options.out, options.data
            )
    except FedwardError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


def _data_from_environment() -> Path | None:
    value = os.environ.get("FEDWARD_DATA")
    return Path(value) if value else None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _check_data(folder: Path | None) -> None:
    if folder is None:
        note = "FEDWARD_DATA is not set: own wording only, no near-duplicate check, and a weaker model"
        print(f"WARNING: {note}", file=sys.stderr)
    elif not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; set FEDWARD_DATA or --data to the data folder, or leave both out")


def _write_corpus(options: argparse.Namespace) -> None:
    if options.kind == "benign":
        pairs = benign_pairs(options.n, options.seed, options.alarming_share, data=options.data)
    else:
        draw = harmful_pairs if options.kind == "harmful" else red_team_prompts
        pairs = draw(options.n, options.seed, data=options.data)
    lines = (json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs)
    write_atomically(make_dir(options.out.parent) / options.out.name, "".join(lines))
    print(f"{options.out}: {len(pairs)} {options.kind} pairs")


if __name__ == "__main__":
    sys.exit(main())
