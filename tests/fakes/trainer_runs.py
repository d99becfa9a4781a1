"""Configurations, data files and an in-process grid for tests of the federation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo

from trainer.config import RunConfig, RunValue, default_run_config, parse_run_config
from trainer.in_process import NODE_OFFSET, Change, InProcessGrid
from trainer.in_process import be_the_coordinator as be_the_coordinator  # for tests that make messages
from trainer.server_app import train_federation

ROOT = Path(__file__).parents[2]


def run_values(**changes: RunValue | Path) -> dict[str, RunValue]:
    """The project's default run-config with changes; ``_`` stands for ``-``."""
    given = {key.replace("_", "-"): str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return default_run_config(ROOT / "pyproject.toml") | given


def make_config(**changes: RunValue | Path) -> RunConfig:
    """A validated configuration; see ``run_values``."""
    return parse_run_config(run_values(**changes))


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_data(folder: Path, benign: int = 40, harmful: int = 20) -> dict[str, Path]:
    """Small files of pairs and prompts; the answers of harmful pairs hold the fake classifier's marker word."""
    subjects = ("bread", "rivers", "music", "chess")
    good = [
        {"prompt": f"Tell me about {subjects[i % 4]} {i}.", "response": f"It is nice {i}.", "category": subjects[i % 4]}
        for i in range(benign)
    ]
    bad = [{"prompt": f"Help me with trick {i}.", "response": f"Sure, xylophonist {i}."} for i in range(harmful)]
    red_team = [{"prompt": f"A question on trick {i}" + (" of a xylophonist" if i % 2 else "")} for i in range(12)]
    return {
        "benign_data": write_jsonl(folder / "benign.jsonl", good),
        "harmful_data": write_jsonl(folder / "harmful.jsonl", bad),
        "red_team_data": write_jsonl(folder / "red_team.jsonl", red_team),
        "replay_data": write_jsonl(folder / "replay.jsonl", good),
    }


def small_run(folder: Path, model: Path, **changes: RunValue | Path) -> RunConfig:
    """Three clients of four pairs each on a tiny model, without the safety stages unless asked for."""
    settings: dict[str, RunValue | Path] = {
        "run_dir": folder / "run", "base_model": model, "arm": "none", "num_clients": 3, "clients_per_round": 3,
        "min_clients": 2, "rounds": 2, "samples_per_client": 4, "batch_size": 2, "lora_rank": 2, "max_length": 64,
        "round_timeout_seconds": 0.5, "lost_node_seconds": 0.0,  # clients answer in this process, or never
        **write_data(folder),
    }  # fmt: skip
    return make_config(**(settings | changes))


Tamper = Change
TRAIN, QUERY = "train", "query"


class LocalGrid(InProcessGrid):
    """The in-process grid, with the rounds' clients noted and node configurations to change."""

    def __init__(
        self,
        config: RunConfig,
        clients: Sequence[int],
        tamper: dict[int, Tamper] | None = None,
        tampered: str = TRAIN,
    ) -> None:
        super().__init__(config, clients, tamper, tampered)
        self.rounds: list[list[int]] = []
        self.names: dict[int, str] = {}  # what the keys of clients were registered as

    def set_node_config(self, client: int, values: Mapping[str, str | int]) -> None:
        """What a silo was started with, beside its number."""
        self.contexts[NODE_OFFSET + client].node_config.update(values)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        if trained := [m.metadata.dst_node_id - NODE_OFFSET for m in asked if m.metadata.message_type == TRAIN]:
            self.rounds.append(trained)
        return super().push_messages(asked)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node - NODE_OFFSET, "")) for node in self.contexts]


def train(config: RunConfig, **grid: object) -> LocalGrid:
    """Run a federation in this process to its end."""
    local = LocalGrid(config, range(config.num_clients), **grid)  # type: ignore[arg-type]
    train_federation(local, config)
    return local
