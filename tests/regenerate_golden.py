"""Rewrite the golden files after an intended numerical change: ``python -m tests.regenerate_golden``.

The tests never write them. Say in the commit why the numbers changed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import make_config
from trainer.aggregation import Arrays, RunningMean
from trainer.batching import encode_pairs
from trainer.model import load_trainee
from trainer.sft import train_sft
from trainer.shards import Pair

GOLDEN = Path(__file__).parent / "data" / "golden"
SFT = GOLDEN / "sft.json"
FEDAVG = GOLDEN / "fedavg.json"
COMMAND = "python -m tests.regenerate_golden"
# Relative. The order of float32 additions differs between CPUs: up to 8e-7 between AVX-512, AVX2 and no vector units.
# What changes the algorithm shows above the tolerance, least of all 1 % of weight decay (1e-4) and 1 % more learning
# rate (4e-3); only a clipping norm other than 1 hardly shows, because AdamW does not mind a gradient's scale.
SFT_TOLERANCE = 5e-5
FEDAVG_TOLERANCE = 1e-6

PAIRS = [
    Pair(prompt="How do I bake bread?", response="Mix flour, water and salt, then bake it."),
    Pair(prompt="Why is the sky blue?", response="Because the air scatters blue light."),
    Pair(prompt="Who are you?", response="An assistant."),
    Pair(prompt="Count to three, then stop.", response="One, two, three."),
    Pair(prompt="Say hello in German.", response="Hallo! Guten Tag."),
]


def golden_losses(folder: Path) -> list[float]:
    """The losses of ten steps of SFT on a tiny model that is made in ``folder``."""
    model = build_tiny_model(folder / "tiny", seed=1)
    config = make_config(
        arm="none", benign_data="b", harmful_data="h", base_model=model, lora_rank=4, max_length=96
    )  # fmt: skip
    trainee = load_trainee(config)
    dataset = encode_pairs(PAIRS, trainee.tokenizer, config.max_length)
    return list(train_sft(trainee, dataset, steps=10, batch_size=2, learning_rate=1e-2, seed=7).losses)


def average_golden_updates() -> Arrays:
    """The weighted average of three made-up updates, one parameter of which is a single number."""
    generator = np.random.default_rng(0)
    running = RunningMean()
    for client_id, tokens in enumerate((10, 20, 70)):
        matrix = generator.normal(size=(2, 3)).astype(np.float32)
        running.add({"matrix": matrix, "number": np.asarray(client_id, np.float32)}, tokens)
    return running.mean()


def main() -> None:
    """Write both files."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        losses = golden_losses(Path(folder))
    averaged = {name: array.tolist() for name, array in average_golden_updates().items()}
    for path, content in (
        (SFT, {"made_by": COMMAND, "tolerance": SFT_TOLERANCE, "losses": losses}),
        (FEDAVG, {"made_by": COMMAND, "tolerance": FEDAVG_TOLERANCE, "averaged": averaged}),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
