"""What aggregation costs by the number of clients: CPU time and memory, streamed and with every reply kept.

Each figure comes from a process of its own. Replies are made one at a time from a seed, as Flower's messages, and what
it takes to make them is not counted in the time: unpacking, checking and adding them is. Memory is the largest
resident size minus that before the first reply.
"""

import gc
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from services.common.benchmarks import spread
from services.contracts.errors import ConfigError
from trainer.aggregation import Arrays, check_update
from trainer.in_process import be_the_coordinator
from trainer.lora import A_SUFFIX, B_SUFFIX
from trainer.server_app import unpack
from trainer.strategies.fedavg import FedAvg
from trainer.strategies.flower import WEIGHT, to_record

COUNTS = (10, 100, 1000, 10_000)
WAYS = {"streamed": COUNTS, "kept": COUNTS[:3]}  # ours; Flower's FedAvg, whose 10,000 replies would take 5 GB
RANK, LAYERS, HIDDEN, INNER = 8, 4, 192, 512  # about those of the miniature model under the default lora-rank
SEED = 0


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way and number of clients."""
    for way, counts in WAYS.items():
        yield from rows_of(way, counts, rounds)


def rows_of(way: str, counts: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each number of clients, printed as it is there."""
    for clients in counts:
        found = [run_apart(way, clients) for _ in range(rounds)]
        figures = {key: spread([one[key] for one in found]) for key in found[0]}
        cost = f"{figures['seconds']['median']:8.2f} CPU s  {figures['memory_mb']['median']:8.1f} MB"
        print(f"{way:>9}  {clients:>6} clients  {cost}")
        yield {"way": way, "clients": clients, **figures}


def run_apart(way: str, clients: int) -> dict[str, float]:
    """Measure in a process of its own; raises ConfigError when that fails."""
    command = [sys.executable, "-m", "trainer.bench.aggregation", way, str(clients)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(way: str, clients: int) -> dict[str, float]:
    """Aggregate that many replies; gives CPU seconds and MB."""
    be_the_coordinator()
    sent = blank_adapter()
    aggregate = _streamed if way == "streamed" else _kept
    aggregate(sent, 2)  # what is loaded at first use is not the clients' cost,
    gc.collect()
    gc.freeze()  # and neither is looking through that for garbage
    before = _resident("VmRSS")
    seconds = aggregate(sent, clients)
    return {"seconds": round(seconds, 3), "memory_mb": round(_resident("VmHWM") - before, 1)}


def _streamed(sent: Arrays, clients: int) -> float:
    strategy, seconds = FedAvg(), 0.0
    strategy.begin(sent, 1)
    for client, reply in enumerate(replies(sent, clients)):
        began = time.process_time()
        update = unpack(client, reply)
        check_update(update, strategy.reply_reference(update.arrays), (WEIGHT,), max_tokens=1000)
        strategy.add(update)
        seconds += time.process_time() - began
    began = time.process_time()
    strategy.finish()
    return seconds + time.process_time() - began


def _kept(sent: Arrays, clients: int) -> float:
    kept = list(replies(sent, clients))
    began = time.process_time()
    FlowerFedAvg(weighted_by_key=WEIGHT).aggregate_train(1, kept)
    return time.process_time() - began


def replies(sent: Arrays, clients: int) -> Iterator[Message]:
    """Clients' replies, made when they are asked for."""
    for client in range(clients):
        generator = np.random.default_rng([SEED, client])
        arrays = {name: generator.standard_normal(array.shape, np.float32) for name, array in sent.items()}
        counts = MetricRecord({WEIGHT: 1 + client % 1000})
        content = RecordDict({"arrays": to_record(arrays), "metrics": counts})
        yield Message(content, dst_node_id=client, message_type="train")


def blank_adapter() -> Arrays:
    """Zeros in the shape of an adapter for a small transformer's linear layers."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    arrays = {}
    for number, (inputs, outputs) in enumerate(shapes * LAYERS):
        arrays[f"layer.{number}{A_SUFFIX}"] = np.zeros((RANK, inputs), np.float32)
        arrays[f"layer.{number}{B_SUFFIX}"] = np.zeros((outputs, RANK), np.float32)
    return arrays


def _resident(key: str) -> float:
    """This process's resident memory in MB: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """CPU time and memory over the number of clients, as PNG; raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install 'fedward[evaluation]'") from error
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    labels = {"streamed": "one at a time (Fedward)", "kept": "all replies kept (Flower's FedAvg)"}
    for place, (key, title) in enumerate((("seconds", "CPU seconds"), ("memory_mb", "memory, MB")), start=1):
        axes = figure.add_subplot(1, 2, place)
        for way, style in (("streamed", "o-"), ("kept", "s--")):
            mine = [row for row in rows if row["way"] == way]
            axes.plot([row["clients"] for row in mine], [row[key]["median"] for row in mine], style, label=labels[way])
        axes.set(xscale="log", yscale="log", xlabel="clients", title=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
