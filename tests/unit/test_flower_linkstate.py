"""What the SuperLink does with replies that are sent again: the round loop relies on getting each once."""

import uuid

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories


@pytest.fixture
def question(state: LinkState, monkeypatch: pytest.MonkeyPatch) -> Message:
    """A message of a run to one node, as the SuperLink stores it."""
    node = state.create_node("account", "name", b"key", 30.0, name="client-0")
    state.activate_node(node, 30.0)
    run = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, "account", TaskType.SERVER_APP)
    for name, value in (("_run_id", run), ("_task_id", 1), ("_node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, name, value)
    message = identified(Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN))
    assert state.store_message_ins(message)
    return message


@pytest.fixture
def state() -> LinkState:
    return get_objectstore_linkstate_factories(":memory:", get_federation_manager())[1].state()


def identified(message: Message) -> Message:
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return message


def reply_to(question: Message, sender: int | None = None) -> Message:
    reply = identified(Message(RecordDict(), reply_to=question))
    if sender is not None:
        reply.metadata.__dict__["_src_node_id"] = sender
    return reply


def test_reply_that_is_sent_again_is_handed_out_once(state: LinkState, question: Message) -> None:
    reply = reply_to(question)
    run, asked = question.metadata.run_id, {question.metadata.message_id}
    assert state.store_message_res(reply) == state.store_message_res(reply) == reply.metadata.message_id
    assert [found.metadata.message_id for found in state.get_message_res(asked, run)] == [reply.metadata.message_id]
    assert state.get_message_res(asked, run) == []


def test_second_reply_to_one_message_is_refused(state: LinkState, question: Message) -> None:
    assert state.store_message_res(reply_to(question))
    assert state.store_message_res(reply_to(question)) is None


def test_reply_of_a_node_that_was_not_asked_is_refused(state: LinkState, question: Message) -> None:
    assert state.store_message_res(reply_to(question, sender=question.metadata.dst_node_id + 1)) is None


def test_reply_to_a_message_that_was_never_sent_is_refused(state: LinkState, question: Message) -> None:
    old = reply_to(question)
    old.metadata.__dict__["_reply_to_message_id"] = uuid.uuid4().hex
    assert state.store_message_res(old) is None
