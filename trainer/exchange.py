"""Messages between the coordinator and the nodes: who is there, ask them, and what to do about those that are lost.

A node is lost when it ends in the middle of its work: killed, restarted, cut off. It is asked again as soon as it is
back, so that a crash changes nothing of the round's result; ``lost-node-seconds`` is how long it is waited for.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from services.contracts.errors import AdapterError
from trainer.aggregation import TooFewClients
from trainer.config import RunConfig

log = logging.getLogger("flwr")
PULLED_AT_ONCE = 8  # replies; the others wait at the SuperLink, so that memory does not grow with their number
POLL_SECONDS = 0.5  # Grid.send_and_receive would look every 3 s only
GRACE_SECONDS = 60.0  # a message expires this long after its round; a reply within it is counted, not used
CLIENT_NAME = "client-"  # a key registered as client-3 is client 3's, whatever its node says
LOST = {
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}


class Asked(NamedTuple):
    """Whose reply is waited for, and since when that node was connected."""

    node: int
    connected_since: str


class Lost(NamedTuple):
    """A node that was lost: when (monotonic seconds), and what the SuperLink said of it."""

    since: float
    reply: Message | None


@dataclass
class Fleet:
    """The nodes of one run, as the coordinator knows them.

    ``clients`` are client numbers by node id; ``missed`` is since when a client is not there (monotonic seconds);
    ``late`` are the clients that had not replied when their round ended, by message id.
    """

    grid: Grid
    config: RunConfig
    clients: dict[int, int] = field(default_factory=dict)
    missed: dict[int, float] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)

    def roll_call(self) -> dict[int, int]:
        """Wait for this round's nodes, and ask those not yet known which client they are.

        A client that was there before is waited for as long as a lost node is; at the start, so are all
        ``num-clients``: whom a round samples must not depend on who comes back first after a crash.

        Returns:
            Client number by node id, of the nodes that are connected now.

        Raises:
            TooFewClients: ``min-clients`` nodes did not connect within the round's time limit, or did not say who
                they are.
        """
        began = time.monotonic()
        while not self._complete(nodes := connected(self.grid), time.monotonic() - began):
            if time.monotonic() - began > self.config.round_timeout_seconds and len(nodes) < self.config.min_clients:
                raise TooFewClients(f"{len(nodes)} of at least {self.config.min_clients} clients connected in time")
            time.sleep(POLL_SECONDS)
        present = {node: client for node, client in self.clients.items() if node in nodes}
        self._learn(present, nodes)
        if len(present) < self.config.min_clients:
            raise TooFewClients(f"{len(present)} of at least {self.config.min_clients} clients said who they are")
        if len(present) < self.config.clients_per_round:
            log.warning("%d clients are there, clients-per-round is %d", len(present), self.config.clients_per_round)
        self.clients |= present
        return present

    def _complete(self, nodes: Mapping[int, Any], waited: float) -> bool:
        """Whether to go on with these nodes, or to wait for more."""
        now = time.monotonic()
        here = {self.clients[node] for node in nodes if node in self.clients}
        for client in set(self.clients.values()):
            if client in here:
                self.missed.pop(client, None)
            else:
                self.missed.setdefault(client, now)
        patience = self.config.lost_node_seconds
        first_time = not self.clients and len(nodes) < self.config.num_clients and waited < patience
        waiting = first_time or any(now - since < patience for since in self.missed.values())
        return len(nodes) >= self.config.min_clients and not waiting

    def _learn(self, present: dict[int, int], nodes: Mapping[int, Any]) -> None:
        """Add the client numbers of nodes that are not yet known: by the name of their key, or by asking them."""
        unknown = sorted(nodes.keys() - present.keys())
        unnamed = {node: RecordDict() for node in unknown if not nodes[node].name}
        replies = dict(self.ask(unnamed, MessageType.QUERY))
        for node in unknown:
            try:
                client_id = (
                    read_name(node, nodes[node].name) if nodes[node].name else read_number(node, replies.get(node))
                )
            except AdapterError as error:
                log.warning("left out: %s", error.message)
                continue
            if client_id in present.values():
                log.warning("node %d says that it is client %d, as another node does: left out", node, client_id)
                continue
            present[node] = client_id

    def ask(self, contents: Mapping[int, RecordDict], message_type: str) -> Iterator[tuple[int, Message | None]]:
        """Send each node its message; yields each node with its reply as it comes, at last those that gave none.

        A node that is lost is asked again when it is back. Replies are told apart by the message that they reply to:
        an error reply that the SuperLink makes for a node that is gone has no node of its own.
        """
        pending = self._push(contents, message_type)
        unknown = contents.keys() - {asked.node for asked in pending.values()}
        lost = {node: Lost(time.monotonic(), None) for node in unknown}
        deadline = time.monotonic() + self.config.round_timeout_seconds
        while pending or lost:
            there = connected(self.grid)
            for reply in self._pull(list(pending)):
                node = pending.pop(reply.metadata.reply_to_message_id).node
                if reply.has_error() and reply.error.code in LOST:
                    lost.setdefault(node, Lost(time.monotonic(), reply))
                else:
                    lost.pop(node, None)
                    yield node, reply
            for message_id, asked in list(pending.items()):
                # It was restarted under the same identity, and knows nothing of what it was asked before.
                if asked.node in there and there[asked.node].last_activated_at != asked.connected_since:
                    del pending[message_id]
                    lost.setdefault(asked.node, Lost(time.monotonic(), None))
            now = time.monotonic()
            idle = lost.keys() - {asked.node for asked in pending.values()}
            for node in sorted(idle):
                if now - lost[node].since >= self.config.lost_node_seconds:
                    yield node, lost.pop(node).reply
            if back := sorted(node for node in idle & lost.keys() if node in there):
                log.warning("asking %d node(s) again that were lost and are back", len(back))
                pending |= self._push({node: contents[node] for node in back}, message_type)
            if now > deadline:
                break
            if pending or lost:
                time.sleep(POLL_SECONDS)
        self.late |= {message_id: self.clients.get(asked.node, -1) for message_id, asked in pending.items()}
        for node in sorted({asked.node for asked in pending.values()} | lost.keys()):
            yield node, lost[node].reply if node in lost else None

    def _push(self, contents: Mapping[int, RecordDict], message_type: str) -> dict[str, Asked]:
        there = connected(self.grid)
        ttl = self.config.round_timeout_seconds + GRACE_SECONDS
        messages = [
            Message(content, dst_node_id=node, message_type=message_type, ttl=ttl) for node, content in contents.items()
        ]
        ids = self.grid.push_messages(messages) if messages else []
        return {
            message_id: Asked(node, there[node].last_activated_at if node in there else "")
            for message_id, node in zip(ids, contents, strict=True)
            if message_id  # the SuperLink gives none for a node that it no longer knows
        }

    def _pull(self, message_ids: Sequence[str]) -> Iterator[Message]:
        for start in range(0, len(message_ids), PULLED_AT_ONCE):
            yield from self.grid.pull_messages(message_ids[start : start + PULLED_AT_ONCE])

    def count_late(self) -> list[int]:
        """The clients whose replies to an earlier round have come meanwhile; each is told once."""
        if not self.late:
            return []
        came = [reply for reply in self.grid.pull_messages(list(self.late)) if not reply.has_error()]
        return sorted(self.late.pop(reply.metadata.reply_to_message_id) for reply in came)


def connected(grid: Grid) -> dict[int, Any]:
    """What the SuperLink knows of each node that is connected now (Flower's ``NodeInfo``), by node id."""
    return {node.node_id: node for node in grid.get_nodes()}


def read_name(node: int, name: str) -> int:
    """The client number that a node's key was registered for; raises AdapterError when its name says none."""
    number = name.removeprefix(CLIENT_NAME)
    if name == number or not number.isdecimal():
        raise AdapterError(f"node {node}: its key was registered as {name!r}, not as {CLIENT_NAME}<number>")
    return int(number)


def read_number(node: int, reply: Message | None) -> int:
    """The number of the client that a node says it is; raises AdapterError when it says nothing of the kind."""
    try:
        return int(content_of(f"node {node}", reply).metric_records["client"]["client-id"])  # type: ignore[arg-type]  # a list is refused below
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"node {node}: it does not say which client it is ({type(error).__name__})") from error


def write_order(round_number: int, base_model_sha256: str, versions: str, last_counted: int) -> ConfigRecord:
    """What is asked of one client in a round.

    Args:
        round_number: from 1.
        base_model_sha256: of the model whose adapter is sent.
        versions: what the coordinator has installed, as ``installed_versions`` says it.
        last_counted: the client's last round with an accepted update, or 0.
    """
    return ConfigRecord({
        "round": round_number,
        "base-model-sha256": base_model_sha256,
        "versions": versions,
        "last-counted": last_counted,
    })  # fmt: skip


def content_of(who: str, reply: Message | None) -> RecordDict:
    """What was replied; raises AdapterError when that is an error or nothing."""
    if reply is None:
        raise AdapterError(f"{who}: no answer within round-timeout-seconds")
    if reply.has_error():
        raise AdapterError(f"{who}: {first_line(reply.error.reason)}")
    return reply.content


def first_line(reason: str | None) -> str:
    """The first line of an error's reason, which may hold a whole traceback."""
    return (reason or "unknown error").strip().splitlines()[0][:300]
