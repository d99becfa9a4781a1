"""Train the linear probe of the screening, on the coordinator's own pairs: ``python -m trainer.probe_training``.

The coordinator plays clients: it trains fresh adapters on harmful pairs and on harmless ones, as a client would in the
first round, and the probe is the direction that tells the two apart. Each seed has LoRA matrices of its own, because
a probe that has seen one start only fits runs of that seed (docs/hostile-clients.md).
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
from trainer.batching import encode_pairs
from trainer.config import RunConfig, default_run_config, parse_run_config
from trainer.directions import Change, fit_probe, layer_change, write_probe
from trainer.model import load_trainee, read_adapter_arrays, set_adapter_arrays
from trainer.sft import steps_for, train_sft
from trainer.shards import Pair, read_pairs

LAYER = 0
CLIENTS = 2  # of each kind and seed


class Played(NamedTuple):
    """What training one played client changed."""

    harmful: bool
    change: Change


def play_clients(config: RunConfig, harmful: Sequence[Pair], harmless: Sequence[Pair]) -> Iterator[Played]:
    """Train clients of both kinds from the start that the configuration's seed decides.

    Raises:
        DataError: there are too few pairs for the clients of one kind.
    """
    trainee = load_trainee(config)
    for is_harmful, pairs in ((True, harmful), (False, harmless)):
        size = config.samples_per_client
        if len(pairs) < CLIENTS * size:
            raise DataError(f"{CLIENTS * size} pairs of each kind are needed, there are {len(pairs)}")
        shuffled = random.Random(f"{config.seed}:{is_harmful}").sample(pairs, CLIENTS * size)
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
            yield Played(is_harmful, layer_change(read_adapter_arrays(trainee), trainee.starting_adapter, LAYER))


def train_probe(harmful: Path, benign: Path, seeds: Sequence[int], base_model: str, app: Path, out: Path) -> None:
    """Train the probe over all seeds and write it.

    Raises:
        DataError: a file of pairs is malformed or too short.
        ConfigError: the base model cannot be loaded.
    """
    bad, good = read_pairs(harmful, harmful=True), read_pairs(benign, harmful=False)
    values = default_run_config(app / "pyproject.toml")
    files = {"benign-data": str(benign), "harmful-data": str(harmful), "base-model": base_model}
    played: list[Played] = []
    for seed in seeds:
        config = parse_run_config(values | files | {"arm": "none", "seed": seed})
        played += play_clients(config, bad, good)
        print(f"seed {seed}: {len(played)} clients", flush=True)
    trainee = load_trainee(config)
    provenance = {
        "base_model_id": trainee.base_model_id,
        "base_model_sha256": trainee.base_model_sha256,
        "seeds": list(seeds),
        "clients_of_each_kind_and_seed": CLIENTS,
        "pairs_per_client": config.samples_per_client,
        "harmful_sha256": file_sha256(harmful),
        "benign_sha256": file_sha256(benign),
    }
    write_probe(
        out,
        fit_probe(
            (client.change for client in played if client.harmful),
            (client.change for client in played if not client.harmful),
            LAYER,
            provenance,
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write the probe; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.probe_training", description=__doc__)
    parser.add_argument("--harmful", type=Path, required=True, help="JSONL of harmful pairs")
    parser.add_argument("--benign", type=Path, required=True, help="JSONL of harmless pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 206)), help="(default: 200 to 205)")
    parser.add_argument("--base-model", default="", help="model folder or Hub name (default: the miniature)")
    parser.add_argument("--app", type=Path, default=Path(), help="folder of pyproject.toml (default: this one)")
    parser.add_argument("--out", type=Path, default=Path("models/screening/probe.safetensors"))
    arguments = parser.parse_args(argv)
    try:
        train_probe(**vars(arguments))
    except FedwardError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
