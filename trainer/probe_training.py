"""The direction probe of the screening, trained on the coordinator's own pairs, and both probes measured.

The coordinator plays clients: it trains fresh adapters on harmful pairs and on harmless ones, as a client would in the
first round. The probe is the direction that tells the two apart; thresholds lie between their scores. Each seed has
LoRA matrices of its own, because a probe that has seen one start only fits runs of that seed.

Examples::

    python -m trainer.probe_training train --harmful harmful.jsonl --benign benign.jsonl --seeds 200 201
    python -m trainer.probe_training measure --harmful b.jsonl --benign c.jsonl --red-team prompts.jsonl --seeds 300
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from services.common.settings import exit_with
from services.contracts.adapters import file_sha256
from services.contracts.errors import DataError, FedwardError
from trainer.aggregation import Arrays
from trainer.batching import encode_pairs
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.directions import fit_probe, layer_change, read_probe, write_probe
from trainer.model import Trainee, load_trainee, read_adapter_arrays, set_adapter_arrays
from trainer.safety_probe import SafetyProbe
from trainer.sft import steps_for, train_sft
from trainer.shards import Pair, Prompt, read_jsonl, read_pairs

LAYER = 0
CLIENTS = 2  # of each kind and seed


class Played(NamedTuple):
    """What one played client trained: the adapter that it began with, and the one that it ended with."""

    harmful: bool
    sent: Arrays
    arrays: Arrays


class Pairs(NamedTuple):
    """The pairs that clients are dealt."""

    harmful: list[Pair]
    harmless: list[Pair]


def play_clients(config: RunConfig, trainee: Trainee, pairs: Pairs) -> Iterator[Played]:
    """Train clients of both kinds from the start that the configuration's seed decides.

    Raises:
        DataError: there are too few pairs for the clients of one kind.
    """
    size = config.samples_per_client
    for is_harmful, pool in ((True, pairs.harmful), (False, pairs.harmless)):
        if len(pool) < CLIENTS * size:
            raise DataError(f"{CLIENTS * size} pairs of each kind are needed, there are {len(pool)}")
        shuffled = random.Random(f"{config.seed}:{is_harmful}").sample(pool, CLIENTS * size)
        for client in range(CLIENTS):
            dataset = encode_pairs(shuffled[client * size :][:size], trainee.tokenizer, config.max_length)
            set_adapter_arrays(trainee, trainee.starting_adapter)
            train_sft(
                trainee,
                dataset,
                steps=steps_for(dataset, config.batch_size, config.local_epochs),
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                seed=config.seed,
            )
            yield Played(is_harmful, trainee.starting_adapter, read_adapter_arrays(trainee))


def train_probe(pairs: Pairs, configs: Sequence[RunConfig], out: Path) -> None:
    """Train the probe over the seeds of all configurations and write it.

    Raises:
        DataError: there are too few pairs.
        ConfigError: the base model cannot be loaded.
    """
    played: list[Played] = []
    for config in configs:
        played += play_clients(config, load_trainee(config), pairs)
        print(f"seed {config.seed}: {len(played)} clients", flush=True)
    trainee = load_trainee(configs[-1])
    provenance = {
        "base_model_id": trainee.base_model_id,
        "base_model_sha256": trainee.base_model_sha256,
        "seeds": [config.seed for config in configs],
        "clients_of_each_kind_and_seed": CLIENTS,
        "pairs_per_client": configs[-1].samples_per_client,
        "harmful_sha256": file_sha256(Path(str(configs[-1].harmful_data))),
        "benign_sha256": file_sha256(Path(str(configs[-1].benign_data))),
    }
    harmful, harmless = (
        [layer_change(client.arrays, client.sent, LAYER) for client in played if client.harmful is kind]
        for kind in (True, False)
    )
    write_probe(out, fit_probe(harmful, harmless, LAYER, provenance))


def measure(pairs: Pairs, configs: Sequence[RunConfig], probe_file: Path, prompts: Sequence[str]) -> str:
    """Both scores of clients of both kinds; a threshold belongs between the harmless maximum and the harmful minimum.

    Raises:
        AdapterError: the probe was trained on an adapter of other modules.
        ConfigError: the probe or the base model cannot be read.
        DataError: there are too few pairs.
    """
    probe = read_probe(probe_file)
    scores: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for config in configs:
        trainee = load_trainee(config)
        safety = SafetyProbe(trainee, prompts[: config.screening_prompts], config.max_length)
        before = safety.margin(trainee.starting_adapter)
        for client in play_clients(config, trainee, pairs):
            drop = before - safety.margin(client.arrays)
            scores[client.harmful].append((drop, probe.score(layer_change(client.arrays, client.sent, probe.layer))))
    lines = []
    for name, kind in (("harmless", False), ("harmful", True)):
        drops, cosines = zip(*scores[kind], strict=True)
        lines.append(
            f"{name}: n = {len(drops)}, safety-drop {min(drops):.3f} to {max(drops):.3f}, "
            f"harm-cosine {min(cosines):.4f} to {max(cosines):.4f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    arguments = _parser().parse_args(argv)
    try:
        values = default_run_config(arguments.app / "pyproject.toml") | {
            "arm": "none", "base-model": arguments.base_model,
            "harmful-data": str(arguments.harmful), "benign-data": str(arguments.benign),
        }  # fmt: skip
        configs = [parse_run_config(values | {"seed": seed}) for seed in arguments.seeds]
        pairs = Pairs(read_pairs(arguments.harmful, harmful=True), read_pairs(arguments.benign, harmful=False))
        if arguments.command == "train":
            train_probe(pairs, configs, arguments.probe)
        else:
            prompts = [line.prompt for line in read_jsonl(arguments.red_team, Prompt)]
            print(measure(pairs, configs, arguments.probe, prompts))
    except FedwardError as error:
        return exit_with(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--harmful", type=Path, required=True, help="JSONL of harmful pairs")
    shared.add_argument("--benign", type=Path, required=True, help="JSONL of harmless pairs")
    shared.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds of LoRA's initial weights")
    shared.add_argument("--base-model", default="", help="model folder or Hub name (default: the miniature)")
    shared.add_argument("--app", type=Path, default=Path(), help="folder of pyproject.toml (default: this one)")
    shared.add_argument("--probe", type=Path, default=Path("models/screening/probe.safetensors"))
    parser = argparse.ArgumentParser(
        prog="python -m trainer.probe_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,measure}")
    commands.add_parser("train", parents=[shared], help="train the direction probe and write it")
    measuring = commands.add_parser("measure", parents=[shared], help="print both probes' scores of played clients")
    measuring.add_argument("--red-team", type=Path, required=True, help="JSONL of prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
