"""Messages to nodes that come, go, crash, come back and are late: by a grid whose nodes do as they are told."""

import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from services.contracts.errors import AdapterError
from tests.fakes.trainer_runs import be_the_coordinator, small_run
from trainer import exchange
from trainer.aggregation import TooFewClients
from trainer.config import RunConfig
from trainer.exchange import Fleet, read_name

ANSWER, SILENCE = RecordDict(), None
Answer = RecordDict | int | None  # what a node sends back, the code of an error, or nothing


class ScriptedGrid(Grid):
    """Nodes by id: what each answers, message by message; ``at_poll`` is called before each look for replies."""

    def __init__(self, script: dict[int, list[Answer]], names: bool = True) -> None:
        be_the_coordinator()
        self.script = script
        self.nodes = {node: NodeInfo(node_id=node, name=f"client-{node}" if names else "") for node in script}
        self.asked: list[int] = []
        self.at_poll: Callable[[], None] = lambda: None
        self.replies: dict[str, Message] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return list(self.nodes.values())

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]
            node = message.metadata.dst_node_id
            self.asked.append(node)
            match self.script[node].pop(0):
                case int(code):
                    self.replies[ids[-1]] = Message(Error(code, "as told"), reply_to=message)
                case RecordDict() as content:
                    self.replies[ids[-1]] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.at_poll()
        return [self.replies.pop(message_id) for message_id in message_ids if message_id in self.replies]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_run(tmp_path, tmp_path / "model", round_timeout_seconds=20.0, lost_node_seconds=20.0)


def ask(grid: ScriptedGrid, config: RunConfig) -> dict[int, Message]:
    replies = dict(Fleet(grid, config).ask(dict.fromkeys(grid.script, RecordDict()), MessageType.TRAIN))
    assert replies.keys() == grid.script.keys()
    return {node: reply for node, reply in replies.items() if reply}


@pytest.mark.parametrize("code", sorted(exchange.LOST))
def test_lost_node_that_is_there_is_asked_again(config: RunConfig, code: int) -> None:
    grid = ScriptedGrid({1: [code, ANSWER], 2: [ANSWER]})
    replies = ask(grid, config)
    assert grid.asked == [1, 2, 1]
    assert [replies[node].has_error() for node in (1, 2)] == [False, False]


def test_stragglers_do_not_hold_up_the_replies_of_others(config: RunConfig) -> None:
    hasty = config.model_copy(update={"round_timeout_seconds": 0.1})
    slow = exchange.PULLED_AT_ONCE
    grid = ScriptedGrid({node: [SILENCE if node < slow else ANSWER] for node in range(3 * slow)})
    assert list(ask(grid, hasty)) == list(range(slow, 3 * slow))


def test_nodes_that_the_superlink_has_forgotten_are_asked_again(config: RunConfig) -> None:
    grid = ScriptedGrid({1: [ANSWER], 2: [ANSWER], 3: [ANSWER]})
    push, forgotten = grid.push_messages, {2, 3}

    def push_to_the_known(messages: Iterable[Message]) -> Iterable[str]:
        """An empty id for a node that is not known, as Flower's grid has it."""
        asked = list(messages)
        sent = iter(push([message for message in asked if message.metadata.dst_node_id not in forgotten]))
        ids = ["" if message.metadata.dst_node_id in forgotten else next(sent) for message in asked]
        forgotten.clear()
        return ids

    grid.push_messages = push_to_the_known  # type: ignore[method-assign]
    assert not any(reply.has_error() for reply in ask(grid, config).values())
    assert grid.asked == [1, 2, 3]


def test_error_of_the_client_itself_is_its_answer(config: RunConfig) -> None:
    grid = ScriptedGrid({1: [ErrorCode.CLIENT_APP_RAISED_EXCEPTION], 2: [ErrorCode.INVALID_FAB]})
    replies = ask(grid, config)
    assert grid.asked == [1, 2]
    assert all(reply.has_error() for reply in replies.values())


def test_node_that_is_away_is_asked_when_it_is_back(config: RunConfig) -> None:
    grid = ScriptedGrid({1: [ErrorCode.NODE_UNAVAILABLE, ANSWER]})
    comes_back(grid, 1, at_look=5)
    assert not ask(grid, config)[1].has_error()
    assert grid.asked == [1, 1]


def comes_back(grid: ScriptedGrid, node: int, at_look: int) -> None:
    """Take a node away until the coordinator has looked so often who is there."""
    away = grid.nodes.pop(node)
    looked = iter(range(10_000))
    get_nodes = grid.get_nodes

    def look() -> list[NodeInfo]:
        if next(looked) == at_look:
            grid.nodes[node] = away
        return get_nodes()

    grid.get_nodes = look  # type: ignore[method-assign]


def test_node_that_was_restarted_unnoticed_is_asked_again(config: RunConfig) -> None:
    grid = ScriptedGrid({1: [SILENCE, ANSWER]})
    grid.at_poll = lambda: setattr(grid.nodes[1], "last_activated_at", "later")
    assert not ask(grid, config)[1].has_error()
    assert grid.asked == [1, 1]


def test_node_that_stays_away_or_crashes_for_ever_is_given_up(config: RunConfig) -> None:
    patience = config.model_copy(update={"lost_node_seconds": 0.2})
    grid = ScriptedGrid({1: [ErrorCode.NODE_UNAVAILABLE], 2: [ErrorCode.CLIENT_APP_CRASHED] * 1000})
    del grid.nodes[1]
    replies = ask(grid, patience)
    assert [replies[node].error.code for node in (1, 2)] == [ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED]


def test_straggler_ends_with_the_round_and_its_late_reply_is_counted_once(config: RunConfig) -> None:
    hasty = config.model_copy(update={"round_timeout_seconds": 0.1})
    grid = ScriptedGrid({0: [SILENCE], 1: [ANSWER]})
    fleet = Fleet(grid, hasty)
    fleet.clients = {0: 0, 1: 1}
    replies = list(fleet.ask(dict.fromkeys([0, 1], RecordDict()), MessageType.TRAIN))
    assert [(node, reply is not None) for node, reply in replies] == [(1, True), (0, False)]
    assert fleet.count_late() == []
    (message_id,) = fleet.late
    grid.replies[message_id] = reply_to(message_id)
    assert fleet.count_late() == [0]
    assert fleet.count_late() == []


def reply_to(message_id: str) -> Message:
    question = Message(RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
    question.metadata.__dict__["_message_id"] = message_id
    return Message(ANSWER, reply_to=question)


def test_registered_names_decide_who_is_who_without_a_question(config: RunConfig) -> None:
    grid = ScriptedGrid({7: [], 8: [], 9: []})
    for node, client in ((7, 2), (8, 0), (9, 1)):
        grid.nodes[node].name = f"client-{client}"
    assert Fleet(grid, config).roll_call() == {7: 2, 8: 0, 9: 1}
    assert grid.asked == []


@pytest.mark.parametrize("name", ["silo-1", "client-", "client-x", "client--1", "1"])
def test_key_registered_under_another_name_is_nobodys(name: str) -> None:
    with pytest.raises(AdapterError, match=f"registered as {name!r}"):
        read_name(7, name)


def test_second_node_of_one_client_is_left_out(config: RunConfig) -> None:
    grid = ScriptedGrid({5: [], 6: [], 7: []})
    grid.nodes[6].name = "client-5"
    assert Fleet(grid, config.model_copy(update={"lost_node_seconds": 0.0})).roll_call() == {5: 5, 7: 7}


@pytest.mark.parametrize("sampled", [3, 2])
def test_first_roll_call_waits_for_all_clients_also_for_a_round_of_fewer(config: RunConfig, sampled: int) -> None:
    grid = ScriptedGrid({0: [], 1: [], 2: []})
    comes_back(grid, 2, at_look=5)
    fewer = config.model_copy(update={"clients_per_round": sampled})
    assert Fleet(grid, fewer).roll_call() == {0: 0, 1: 1, 2: 2}


def test_client_that_stays_away_is_waited_for_once(config: RunConfig) -> None:
    grid = ScriptedGrid({0: [], 1: [], 2: []})
    fleet = Fleet(grid, config.model_copy(update={"lost_node_seconds": 0.3}))
    fleet.roll_call()
    del grid.nodes[2]
    began = time.monotonic()
    assert fleet.roll_call() == {0: 0, 1: 1}
    waited = time.monotonic() - began
    assert waited >= 0.3
    since = fleet.missed[2]
    assert fleet.roll_call() == {0: 0, 1: 1}
    assert fleet.missed[2] == since  # not missed anew, so not waited for


def test_too_few_nodes_end_the_run(config: RunConfig) -> None:
    hasty = config.model_copy(update={"round_timeout_seconds": 0.1, "lost_node_seconds": 0.0})
    with pytest.raises(TooFewClients, match="1 of at least 2 clients connected in time"):
        Fleet(ScriptedGrid({0: []}), hasty).roll_call()
