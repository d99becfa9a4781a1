"""A client's training by the run's strategy: from the arrays that came to those that go back."""

from pathlib import Path
from typing import NamedTuple

from trainer.aggregation import Arrays
from trainer.batching import Dataset
from trainer.config import B_ONLY, RESIDUAL, RunConfig
from trainer.control import read_control, split_control, with_control, write_control
from trainer.local_rules import LocalRule
from trainer.lora import b_only, cut, head
from trainer.model import Trainee, read_adapter_arrays, set_adapter_arrays
from trainer.sft import SftResult, steps_for, train_sft


class Order(NamedTuple):
    """What the coordinator asks a client for: a round, and the client's last round before it that counted, or 0."""

    round_number: int
    last_counted: int


def train_locally(
    trainee: Trainee, received: Arrays, dataset: Dataset, config: RunConfig, order: Order, *, seed: int, folder: Path
) -> tuple[SftResult, Arrays]:
    """Train the adapter that was received.

    Args:
        trainee: this process's model, of this client's rank.
        received: the arrays of the coordinator's message.
        dataset: the client's shard.
        config: the run's settings.
        order: which round it is.
        seed: for the order of the data.
        folder: the client's own, for what it keeps from round to round.

    Returns:
        What the training did, and the arrays to send back.

    Raises:
        AdapterError: the arrays do not fit the model.
        DataError: there is nothing to train on, the loss is not finite, or the client's state is lost.
    """
    sent, control = split_control(received)
    adapter = sent if config.own_rank == config.lora_rank else cut(sent, config.own_rank, of=config.lora_rank)
    own = read_control(folder, order.last_counted, like=control) if control else {}
    set_adapter_arrays(trainee, adapter)
    result = train_sft(
        trainee,
        dataset,
        steps=steps_for(dataset, config.batch_size, config.local_epochs),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        rule=client_rule(config, {name: control[name] - own[name] for name in control} or None),
    )
    trained = read_adapter_arrays(trainee)
    if config.strategy in B_ONLY:
        return result, b_only(trained)
    if config.strategy in RESIDUAL:
        return result, head(trained, config.lora_rank - config.residual_rank)
    if control:
        write_control(folder, order.round_number, result.mean_gradient, order.last_counted)
        change = {name: gradient - own[name] for name, gradient in result.mean_gradient.items()}
        return result, with_control(trained, change)
    return result, trained


def client_rule(config: RunConfig, correction: Arrays | None) -> LocalRule:
    """How a client trains under the run's strategy."""
    return LocalRule(
        optimizer=config.local_optimizer,
        b_only=config.strategy in B_ONLY,
        trained_rank=config.lora_rank - config.residual_rank if config.strategy in RESIDUAL else None,
        proximal_mu=config.proximal_mu,
        correction=correction,
    )
