"""The coordinator as a Flower ServerApp: ``train_federation`` is the whole loop, top to bottom.

Run it with ``flwr run .``, or with ``python -m trainer run`` which also starts and stops Flower's processes.
"""

import contextlib
import logging
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from services.contracts.errors import AdapterError, ConfigError
from trainer import constitutional, privacy_budget, screening
from trainer.aggregation import (
    Arrays,
    ClientUpdate,
    check_update,
    count_bytes,
    require_enough,
)
from trainer.bundle import installed_versions
from trainer.config import RunConfig, parse_run_config
from trainer.exchange import Fleet, content_of, write_order
from trainer.model import Trainee, adapter_config_json, load_trainee
from trainer.records import (
    Clock,
    RoundRecord,
    RunResult,
    curation_counts,
    curation_reports,
    data_counts,
    expected_counts,
    failure,
    filter_models,
    training_counts,
)
from trainer.run_folder import RunFolder, RunFolderInUse, holding, write_result
from trainer.strategies import Strategy, make_strategy

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation and leave ``result.json`` in the run folder, unless the SuperLink itself failed."""
    config = parse_run_config(context.run_config)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(holding(config.run_dir))
            train_federation(grid, config)
        except RunFolderInUse:
            raise  # its result is another process's to write
        except (httpx.HTTPStatusError, ObjectPushError, ObjectPullError):
            raise  # the SuperLink failed, not the run: without a result it is submitted again, and goes on
        except Exception as error:
            result = failure(error)
            log.error("run failed: %s", result.error)
            with contextlib.suppress(ConfigError):  # the folder may be what the run failed at
                write_result(config.run_dir, result)
            raise


class Replies(NamedTuple):
    """The answers to one round's messages: usable updates without their arrays, reasons why not, and bytes."""

    accepted: list[ClientUpdate]
    rejected: dict[int, str]
    bytes_up: int


def train_federation(grid: Grid, config: RunConfig) -> None:
    """Train for ``config.rounds`` rounds, continuing after those that the run folder already holds.

    Raises:
        FedwardError: a round could not be finished; the rounds before it are on disk.
    """
    folder = RunFolder(config)
    trainee = load_trainee(config)
    strategy = make_strategy(config)
    provenance = manifest_fields(trainee, config)
    if folder.finished:
        adapter = folder.read_last_adapter(trainee.base_model_sha256)
        strategy.restore(folder.read_state())
        log.info("resuming %s after round %d", folder.path, folder.finished)
    else:
        adapter = trainee.starting_adapter
        folder.write_adapter(0, adapter, adapter_config_json(trainee), provenance)
    fleet = Fleet(grid, config)

    for round_number in range(folder.finished + 1, config.rounds + 1):
        clock = Clock()
        # 1. Local training: every sampled client curates its shard if need be, trains, and sends its adapter.
        sampled = sample_clients(fleet.roll_call(), config, round_number)
        sent = strategy.begin(adapter, round_number)
        orders = write_orders(sampled, folder, round_number, trainee.base_model_sha256)
        accepted, rejected, bytes_up = collect_updates(fleet, strategy, sent, orders, sampled, config)
        clock.lap("train")

        # 2. Screening, then aggregation. Without screening the strategy took each update as it came.
        accepted, dropped, screened = screening.screen(trainee, sent, accepted, config, round_number)
        rejected |= dropped
        if config.screening != "off":
            for update in accepted:
                strategy.add(update)
        for reason in rejected.values():
            log.warning("round %d: left out: %s", round_number, reason)
        require_enough(accepted, rejected, config.min_clients)
        spent = privacy_budget.spend(config, folder.path, round_number, accepted, folder.privacy_spent)
        adapter = strategy.finish()
        clock.lap("aggregate")

        # 3. Constitutional alignment of the aggregated adapter, on the coordinator.
        cai = None
        if config.arm.constitutional:
            adapter, cai = constitutional.align(trainee, adapter, config, round_number, provenance)
            provenance["constitution_sha256"] = cai.constitution_sha256
            clock.lap("cai")

        # 4. Register the adapter, then note the round as finished.
        curation = curation_reports(accepted)
        filters = filter_models(accepted)
        provenance |= {"data_counts": data_counts(accepted, curation, private=config.dp != "off"), **filters}
        manifest = folder.write_adapter(round_number, adapter, adapter_config_json(trainee), provenance)
        record = RoundRecord(
            round_number=round_number,
            adapter_sha256=manifest.sha256,
            strategy=config.strategy,
            strategy_metrics=strategy.metrics,
            strategy_state_sha256=folder.write_state(round_number, strategy.state()),
            rejected=rejected,
            screening=screened,
            late=fleet.count_late(),
            privacy=spent,
            cai=cai,
            seconds=sum(clock.laps.values()),
            seconds_by_phase=clock.laps,
            bytes_down=count_bytes(sent) * len(sampled),
            bytes_up=bytes_up,
            **training_counts(accepted),
            **filters,
            **curation_counts(curation),
        )
        folder.finish_round(record)
        report_progress(record, config, len(sampled))
    folder.write_result(completed(folder))


def completed(folder: RunFolder) -> RunResult:
    """The result of a run whose rounds are all finished."""
    return RunResult(
        status="completed",
        rounds=folder.finished,
        adapter=str(folder.adapter_dir(folder.finished)),
        adapter_sha256=folder.rounds[-1].adapter_sha256,
        privacy=folder.privacy_spent,
    )


def manifest_fields(trainee: Trainee, config: RunConfig) -> dict[str, Any]:
    """The fields of every manifest of this run."""
    return {
        "base_model_id": trainee.base_model_id,
        "base_model_sha256": trainee.base_model_sha256,
        "arm": config.arm.value,
        "config": config.identity(),
    }


def sample_clients(clients: Mapping[int, int], config: RunConfig, round_number: int) -> dict[int, int]:
    """Choose this round's clients (node id to client number): the same in every run of the same seed."""
    node_of = {client: node for node, client in clients.items()}
    generator = random.Random(f"{config.seed}:sample:{round_number}")
    chosen = generator.sample(sorted(node_of), min(config.clients_per_round, len(node_of)))
    return {node_of[client]: client for client in sorted(chosen)}


def write_orders(
    sampled: Mapping[int, int], folder: RunFolder, round_number: int, base_model_sha256: str
) -> dict[int, ConfigRecord]:
    """What is asked of each client, by node."""
    versions = installed_versions()
    return {
        node: write_order(round_number, base_model_sha256, versions, folder.last_counted(client))
        for node, client in sampled.items()
    }


def collect_updates(
    fleet: Fleet,
    strategy: Strategy,
    sent: Arrays,
    orders: Mapping[int, ConfigRecord],
    sampled: Mapping[int, int],
    config: RunConfig,
) -> Replies:
    """Send the arrays to the sampled clients, and check each update that comes back and hand it to the strategy.

    A bad reply costs its client the round. Updates that are to be screened first are kept whole.
    """
    arrays = ArrayRecord({name: Array(array) for name, array in sent.items()})
    contents = {node: RecordDict({"arrays": arrays, "config": order}) for node, order in orders.items()}
    expected = expected_counts(config)
    accepted, rejected, bytes_up = [], {}, 0
    for node, reply in fleet.ask(contents, MessageType.TRAIN):
        try:
            update = unpack(sampled[node], reply)
            reference = strategy.reply_reference(update.arrays)
            check_update(update, reference, expected, config.max_tokens_per_client, config.max_update_norm)
            if config.screening == "off":
                strategy.add(update)
        except AdapterError as error:
            rejected[sampled[node]] = error.message
            continue
        accepted.append(update.counts_only() if config.screening == "off" else update)
        bytes_up += count_bytes(update.arrays)
    accepted.sort(key=lambda update: update.client_id)  # the sums of counts must not depend on who came first
    return Replies(accepted, dict(sorted(rejected.items())), bytes_up)


def unpack(client_id: int, reply: Message | None) -> ClientUpdate:
    """Take a client's update out of its reply; raises AdapterError when there is none."""
    who = f"client {client_id}"
    content = content_of(who, reply)
    try:
        arrays = {name: read_array(array) for name, array in content.array_records["arrays"].items()}
        metrics = {name: float(value) for name, value in content.metric_records["metrics"].items()}  # type: ignore[arg-type]  # a list is refused below
    except Exception as error:  # NumPy raises many kinds on bytes that are no array, and none may end the round
        raise AdapterError(f"{who}: the reply cannot be read: {type(error).__name__}: {error}") from error
    return ClientUpdate(client_id, arrays, metrics, filter_model_of(content))


def read_array(array: Array) -> npt.NDArray[Any]:
    """The NumPy array in a message; raises an error of NumPy's choice when there is none."""
    found: object = array.numpy()
    if not isinstance(found, np.ndarray):
        raise TypeError(f"a {type(found).__name__} where an array should be")
    return found


def filter_model_of(content: RecordDict) -> tuple[str, str] | None:
    """Id and sha256 of the classifier that a client curated with."""
    record = content.config_records.get("filter")
    return None if record is None else (str(record.get("model-id"))[:200], str(record.get("model-sha256"))[:64])


def report_progress(record: RoundRecord, config: RunConfig, sampled: int) -> None:
    """One line a round, with an estimate of the time left."""
    log.info(
        "round %d/%d [%s]: %d of %d clients, loss %s, %.1f s, about %.0f s left",
        record.round_number, config.rounds, config.arm.value, len(record.accepted), sampled,
        "not told" if record.loss is None else f"{record.loss:.3f}",
        record.seconds, record.seconds * (config.rounds - record.round_number),
    )  # fmt: skip
    if spent := record.privacy:
        log.info(
            "%s privacy: epsilon %.3g at delta %g, %d releases", spent.dp, spent.epsilon, spent.delta, spent.releases
        )
