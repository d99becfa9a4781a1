"""One client process as Flower's deployment runtime starts it for a message: what each part of it costs, as JSON.

``python -m trainer.bench.client_process WAY FOLDER``; ``trainer.bench.start`` makes the folder and calls it. Nothing is
imported before its turn.
"""

import importlib
import json
import sys
import time
from pathlib import Path


class Phases:
    """CPU seconds by phase; the first phase began with the process."""

    def __init__(self) -> None:
        self.cpu = {"python": time.process_time()}
        self.pause()

    def pause(self) -> None:
        """What happened since the last phase belongs to none."""
        self._began = time.process_time()

    def end(self, phase: str) -> None:
        """A phase ends here, and the next begins."""
        self.cpu[phase] = time.process_time() - self._began
        self.pause()


def main(way: str, folder: Path) -> None:
    """Do what ``flwr-clientapp`` does for one message, but for the exchange of messages with its SuperNode."""
    phases = Phases()
    importlib.import_module("flwr.supernode.cli")  # the command's own module
    phases.end("Flower")
    importlib.import_module("trainer.client_app")
    phases.end("client app")
    if way != "query":
        train(way, folder, phases)
    print(json.dumps({"phases": phases.cpu, "at_end": time.process_time()}), flush=True)


def train(way: str, folder: Path, phases: Phases) -> None:
    """A round; ``plain`` imports as everybody does, with the garbage collector on."""
    from trainer import client_app
    from trainer.config import RunConfig

    if way == "plain":
        importlib.import_module(client_app.TRAINING)
    else:
        client_app.load_libraries()
    phases.end("torch, transformers, peft")
    from trainer.model import load_trainee

    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    trainee = load_trainee(config)
    phases.end("model")
    from trainer.bench.stopwatch import Stopwatch
    from trainer.bench.visits import message

    order, watch = message(trainee, 0), Stopwatch()
    phases.pause()
    with watch.watching(trainee.model):
        client_app.train_round(order, config, 0)
    phases.end("visit")
    phases.cpu["training"] = sum(watch.seconds.values())
    phases.cpu["rest of the visit"] = phases.cpu.pop("visit") - phases.cpu["training"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
