"""Handing updates to a strategy of Flower's and taking its aggregate."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from services.contracts.errors import ConfigError
from trainer.aggregation import Arrays

WEIGHT = "num-tokens"


def to_record(arrays: Arrays) -> ArrayRecord:
    """Arrays as Flower's record."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def aggregate(strategy: FedAvg, round_number: int, updates: Iterable[tuple[Arrays, int]]) -> Arrays:
    """The aggregate of updates with their weights, as float32: some of Flower's formulas end in float64.

    Raises:
        ConfigError: the strategy gives no aggregate, because it has too few updates to work with.
    """
    replies = []
    for number, (arrays, weight) in enumerate(updates):
        content = RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord({WEIGHT: weight})})
        replies.append(Message(content, dst_node_id=number, message_type=MessageType.TRAIN))
    aggregated, _ = strategy.aggregate_train(round_number, replies)
    if aggregated is None:
        raise ConfigError(f"{type(strategy).__name__} gave no aggregate of {len(replies)} updates")
    return {name: array.numpy().astype(np.float32) for name, array in aggregated.items()}
