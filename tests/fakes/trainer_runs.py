"""Configurations, data files and an in-process grid for tests of the federation."""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from trainer.client_app import app as client_app
from trainer.config import RunConfig, RunValue, default_run_config, parse_run_config

ROOT = Path(__file__).parents[2]
NODE_OFFSET = 1000  # node ids that are not client numbers


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


def be_the_coordinator() -> None:
    """Give this process the identity that Flower's messages need and that its runtime would set."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


Tamper = Callable[[Message, Message], Message | None]  # what was asked, what the client answers
TRAIN, QUERY = "train", "query"


class LocalGrid(Grid):
    """A grid whose clients run in this process, by the real ClientApp.

    ``tamper`` changes what a client replies to messages of the type ``tampered``; None is a client that never answers.
    """

    def __init__(
        self,
        config: RunConfig,
        clients: Sequence[int],
        tamper: dict[int, Tamper] | None = None,
        tampered: str = TRAIN,
    ) -> None:
        be_the_coordinator()
        self.tamper = tamper or {}
        self.tampered = tampered
        self.rounds: list[list[int]] = []
        self.names: dict[int, str] = {}  # what the keys of clients were registered as
        self._replies: dict[str, Message] = {}
        values = {
            key: "" if value is None else value for key, value in config.model_dump(mode="json", by_alias=True).items()
        }
        self._contexts = {
            NODE_OFFSET + client: Context(1, NODE_OFFSET + client, {"partition-id": client}, RecordDict(), values)
            for client in clients
        }

    def set_node_config(self, client: int, values: Mapping[str, str | int]) -> None:
        """What a silo was started with, beside its number."""
        self._contexts[NODE_OFFSET + client].node_config.update(values)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids, trained = [], []
        for message in messages:
            message_id = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # as Flower's grids do
            ids.append(message_id)
            client = message.metadata.dst_node_id - NODE_OFFSET
            reply: Message | None = client_app(message, self._contexts[message.metadata.dst_node_id])
            if message.metadata.message_type == TRAIN:
                trained.append(client)
            if reply is not None and client in self.tamper and message.metadata.message_type == self.tampered:
                reply = self.tamper[client](message, reply)
            if reply is not None:
                self._replies[message_id] = reply
        if trained:
            self.rounds.append(trained)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        came = [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]
        return list(reversed(came))  # replies come in any order

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node - NODE_OFFSET, "")) for node in self._contexts]

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError
