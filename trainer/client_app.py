"""A client as a Flower ClientApp: curate the shard, train the adapter on it, send the adapter back.

Nothing but the adapter and the counts named in ``records`` leaves this process for the coordinator, or the reason why
there is none, without any text of the shard.
"""

import gc
import importlib
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from services.common.http import ServiceClient
from services.contracts.errors import ConfigError, DataError, FedwardError
from trainer.bundle import installed_versions
from trainer.config import RunConfig, parse_run_config
from trainer.curation import CuratedShard, curate_once
from trainer.shards import Pair, client_shard

log = logging.getLogger("flwr")
app = ClientApp()
TRAINING = "trainer.local_training"  # brings torch, transformers and peft


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    return Message(RecordDict({"client": MetricRecord({"client-id": client_number(context)})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round; an error becomes an error reply."""
    try:
        config = parse_run_config(context.run_config, silo=context.node_config)
        load_libraries()
        return Message(train_round(message.content, config, client_number(context)), reply_to=message)
    except Exception as error:
        log.exception("training failed")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason_to_tell(error)), reply_to=message)


def load_libraries() -> None:
    """Import what training needs, if this process has not: in Flower's deployment each message has a new process.

    Nothing of 2,000 modules becomes garbage, but the collector would go through their objects again and again, and
    once more at the process's end: a third of the start's CPU time. So it is off meanwhile, and they are frozen.
    """
    if TRAINING in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module(TRAINING)
    finally:
        gc.freeze()
        gc.enable()


def reason_to_tell(error: Exception) -> str:
    """What the coordinator learns of an error: our own words, for those of a library may quote the shard."""
    if isinstance(error, FedwardError):
        return error.message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}; the client's log says more"


def train_round(content: RecordDict, config: RunConfig, client_id: int) -> RecordDict:
    """Curate, train, and pack the reply.

    Raises:
        UpstreamError: the shard could not be curated, so nothing was trained.
        DataError: the shard is missing, malformed, or empty after curation.
        ConfigError: this client's base model, or what is installed here, is not the coordinator's.
    """
    from trainer.local_training import Order, train_locally
    from trainer.model import load_trainee
    from trainer.privacy import release_update
    from trainer.privacy_budget import RELEASES, require_within_limit
    from trainer.tokens import encode_once

    order = content.config_records["config"]
    if order["versions"] != (versions := installed_versions()):
        raise ConfigError(f"{versions} is installed here, {order['versions']!s} at the coordinator; install that")
    started = time.perf_counter()
    pairs = tuple(client_shard(config, client_id))
    curated = curate_shard(pairs, config, client_id) if config.arm.filters else None
    trainee = load_trainee(config)
    if trainee.base_model_sha256 != order["base-model-sha256"]:
        raise ConfigError(
            f"base-model {trainee.base_model_id} has sha256 {trainee.base_model_sha256} here and "
            f"{order['base-model-sha256']!s} at the coordinator"
        )
    folder = client_folder(config, client_id)
    dataset = encode_once(folder, curated.pairs if curated else pairs, trainee.tokenizer, config.max_length)
    if not dataset.examples:
        raise DataError(f"shard {client_id}: no pair is left to train on ({len(pairs)} before curation)")
    asked = Order(int(order["round"]), int(order["last-counted"]))  # type: ignore[arg-type]  # the coordinator sends numbers
    if config.dp == "central":  # the coordinator adds the noise; a silo with a limit of its own holds to that
        require_within_limit(config, asked.round_number, asked.round_number)
    received = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    result, arrays = train_locally(
        trainee,
        received,
        dataset,
        config,
        asked,
        seed=training_seed(config, client_id, order["round"]),
        folder=folder,
    )
    counts: dict[str, MetricRecordValues] = {
        "num-tokens": result.num_tokens,
        "loss": result.loss,
        "steps": result.steps,
        "skipped": dataset.skipped,
        "train-seconds": time.perf_counter() - started,
    }
    if curated:
        counts |= {f"curation-{name}": number for name, number in curated.report.model_dump().items()}
    if config.dp == "local":  # exact counts would tell what the noise hides
        arrays, releases = release_update(arrays, received, config, folder, asked.round_number)
        counts = {RELEASES: releases}
    reply = RecordDict({"arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()})})
    if curated:
        reply["filter"] = ConfigRecord(
            {"model-id": curated.filter_model_id, "model-sha256": curated.filter_model_sha256}
        )
    reply["metrics"] = MetricRecord(counts)
    return reply


def curate_shard(pairs: tuple[Pair, ...], config: RunConfig, client_id: int) -> CuratedShard:
    """Curate this client's shard with the silo's own services, or take the result of an earlier round."""
    folder = client_folder(config, client_id)
    timeout = config.service_timeout_seconds
    mode, floor = config.curation_mode, config.min_filter_recall
    if config.safety_url is None:
        raise ConfigError("curation needs safety-url")
    with ServiceClient("safety", config.safety_url, timeout_seconds=timeout) as safety:
        if mode != "revise" or config.critique_url is None:
            return curate_once(folder, pairs, mode, safety, None, min_filter_recall=floor)
        with ServiceClient("critique", config.critique_url, timeout_seconds=timeout) as critique:
            return curate_once(folder, pairs, mode, safety, critique, min_filter_recall=floor)


def client_folder(config: RunConfig, client_id: int) -> Path:
    """Where a client keeps what is its own."""
    return (config.client_dir or config.run_dir / "clients") / str(client_id)


def training_seed(config: RunConfig, client_id: int, round_number: object) -> int:
    """Another order of the data for each client and round, the same in every run of the same seed."""
    return random.Random(f"{config.seed}:{client_id}:{round_number!r}").getrandbits(32)


def client_number(context: Context) -> int:
    """This node's client number, Flower's ``partition-id``; raises ConfigError when the node was given none."""
    try:
        return int(context.node_config["partition-id"])
    except (KeyError, ValueError) as error:
        raise ConfigError('start the node with --node-config "partition-id=<client number>"') from error


def restart_dead_workers() -> None:
    """Let Ray restart a simulation worker whose process died.

    Flower 1.41 puts the dead worker back into its pool, where it fails every further message at once, so that one
    death would cost this round and all later ones. Flower offers no option for it; this sets Ray's default.
    """
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor  # loads Ray, which only a simulation has

    ClientAppActor._default_options["max_restarts"] = -1  # type: ignore[attr-defined]  # added by ray.remote


if Path(sys.argv[0]).name == "flwr-simulation":
    restart_dead_workers()
