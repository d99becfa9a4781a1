"""Run federations in this one process, for experiments: ``python -m trainer.in_process a.toml b.toml``.

It is the real round loop with real clients, one after the other, without Flower's processes: their start takes longer
than a round of the miniature. The adapters are those of ``python -m trainer run``. Clients may be told to attack.
"""

import argparse
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from services.common.settings import exit_with
from services.contracts.errors import FedwardError
from trainer.__main__ import plan_run
from trainer.client_app import app as client_app
from trainer.config import RunConfig
from trainer.server_app import read_array, train_federation

NODE_OFFSET = 1000  # node ids that are not client numbers
Change = Callable[[Message, Message], Message | None]  # what was asked, what the client would answer


class Boost(NamedTuple):
    """Client ``client`` sends ``factor`` times its change of the adapter."""

    client: int
    factor: float


def be_the_coordinator() -> None:
    """Give this process the identity that Flower's messages need and that its runtime would set."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


class InProcessGrid(Grid):
    """A Flower grid whose clients run in this process, by the real ClientApp.

    ``changes`` replaces what a client replies to messages of the type ``changed``; None is a client that never answers.
    """

    def __init__(
        self,
        config: RunConfig,
        clients: Iterable[int],
        changes: Mapping[int, Change] | None = None,
        changed: str = MessageType.TRAIN,
    ) -> None:
        be_the_coordinator()
        self._changes = changes or {}
        self._changed = changed
        self._replies: dict[str, Message] = {}
        values = {
            key: "" if value is None else value for key, value in config.model_dump(mode="json", by_alias=True).items()
        }
        self.contexts = {
            NODE_OFFSET + client: Context(1, NODE_OFFSET + client, {"partition-id": client}, RecordDict(), values)
            for client in clients
        }

    def get_node_ids(self) -> Iterable[int]:
        """Every client's node."""
        return list(self.contexts)

    def get_nodes(self) -> list[NodeInfo]:
        """Every client's node; none has a key, and so none has a name."""
        return [NodeInfo(node_id=node) for node in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each client answer in turn."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # as Flower's grids do
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            reply: Message | None = client_app(message, self.contexts[node])
            change = self._changes.get(node - NODE_OFFSET)
            if reply is not None and change and message.metadata.message_type == self._changed:
                reply = change(message, reply)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that there are, in another order than that of the messages: replies come in any order."""
        wanted = list(message_ids)[::-1]
        return [self._replies.pop(message_id) for message_id in wanted if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Run) -> None:
        """Not part of an in-process run."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Not part of an in-process run."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not part of an in-process run."""
        raise NotImplementedError


def boost(factor: float) -> Change:
    """An attack: multiply the client's change of the adapter, so that it outweighs the others in the average."""

    def boosted(order: Message, reply: Message) -> Message:
        if reply.has_error():
            return reply
        sent, trained = (message.content.array_records["arrays"] for message in (order, reply))
        reply.content["arrays"] = ArrayRecord(
            {
                name: Array(read_array(sent[name]) + factor * (read_array(array) - read_array(sent[name])))
                for name, array in trained.items()
            }
        )
        return reply

    return boosted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the federations; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.in_process", description=__doc__)
    parser.add_argument("config", type=Path, nargs="+", help="TOML file of run-config keys, one per federation")
    parser.add_argument("--app", type=Path, default=Path(), help="folder of pyproject.toml (default: this one)")
    parser.add_argument(
        "--boost", type=_boost, nargs="*", default=[], metavar="CLIENT=FACTOR", help="clients that scale their update"
    )
    arguments = parser.parse_args(argv)
    try:
        for file in arguments.config:
            config = plan_run(file, arguments.app).config
            attacks = {attack.client: boost(attack.factor) for attack in arguments.boost}
            train_federation(InProcessGrid(config, range(config.num_clients), attacks), config)
    except FedwardError as error:
        return exit_with(error)
    return 0


def _boost(text: str) -> Boost:
    client, _, factor = text.partition("=")
    try:
        return Boost(int(client), float(factor))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIENT=FACTOR, such as 0=5") from error


if __name__ == "__main__":
    sys.exit(main())
