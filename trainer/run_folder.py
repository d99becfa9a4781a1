"""The coordinator's folder of one run: what is done is on disk, so that a run can be resumed after its last round.

::

    <run-dir>/config.json            the configuration that the rounds belong to
    <run-dir>/adapters/round-N/      the adapter after round N; round 0 is the starting point
    <run-dir>/strategy/round-N       what the strategy keeps for the next round, such as a momentum, if anything
    <run-dir>/releases.jsonl         one line per noised aggregate, written before it is made (``trainer.privacy``)
    <run-dir>/rounds.jsonl           one line per finished round, written after its adapter
    <run-dir>/cai/round-N.jsonl      what the constitutional stage did, prompt by prompt
    <run-dir>/result.json            how the last attempt ended
    <run-dir>/lock                   locked for as long as a coordinator's process works in the folder
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.numpy import load, save

from services.common.files import replace_file
from services.contracts.adapters import AdapterManifest
from services.contracts.errors import AdapterError, ConfigError
from trainer.aggregation import Arrays
from trainer.config import RunConfig
from trainer.files import append_line, make_dir, remove_partial, write_atomically, writing
from trainer.privacy_budget import PrivacySpent
from trainer.records import RoundRecord, RunResult
from trainer.registry import read_adapter, write_adapter

LOCK_SECONDS = 30.0  # a coordinator that was told to stop may still be ending


class RunFolderInUse(ConfigError):
    """Another coordinator works in the run folder."""

    code = "run_folder_in_use"


@contextmanager
def holding(run_dir: Path) -> Iterator[None]:
    """Lock the run folder for this process; the lock ends with it, whatever ends it.

    Raises:
        RunFolderInUse: another process holds the lock.
        ConfigError: the folder cannot be written to.
    """
    with (make_dir(run_dir) / "lock").open("ab") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunFolderInUse(f"{run_dir} is in use by another run; stop that, or choose another") from error
                time.sleep(0.2)
        yield


class RunFolder:
    """Reads and writes one run's folder."""

    def __init__(self, config: RunConfig) -> None:
        """Open the folder, new or to be resumed.

        Raises:
            ConfigError: the folder cannot be written to, holds rounds of another configuration, or holds rounds
                while ``resume`` is off.
        """
        self.path = make_dir(config.run_dir)
        for part in ("", "adapters", "strategy", "cai"):
            remove_partial(self.path / part)
        self.rounds = self._finished_rounds()
        if self.rounds:
            self._check_same_run(config)
        write_atomically(self.path / "config.json", json.dumps(config.identity(), indent=2) + "\n")

    @property
    def finished(self) -> int:
        """How many rounds are done."""
        return len(self.rounds)

    @property
    def privacy_spent(self) -> PrivacySpent | None:
        """What the finished rounds have spent; None before the first, or without differential privacy."""
        return self.rounds[-1].privacy if self.rounds else None

    def adapter_dir(self, round_number: int) -> Path:
        """Where the adapter of a round is."""
        return self.path / "adapters" / f"round-{round_number}"

    def read_last_adapter(self, base_model_sha256: str) -> Arrays:
        """The adapter of the last finished round.

        Raises:
            AdapterError: it is not as it was written, or was trained on another base model than that.
        """
        directory = self.adapter_dir(self.finished)
        arrays, manifest = read_adapter(directory, self.rounds[-1].adapter_sha256)
        if manifest.base_model_sha256 != base_model_sha256:
            raise AdapterError(
                f"{directory} was trained on a base model with sha256 {manifest.base_model_sha256}, but base-model "
                f"now has {base_model_sha256}; choose another run-dir"
            )
        return arrays

    def write_adapter(
        self, round_number: int, arrays: Arrays, adapter_config: str, provenance: dict[str, Any]
    ) -> AdapterManifest:
        """Register the adapter of a round."""
        return write_adapter(
            self.adapter_dir(round_number), arrays, adapter_config, {"round_number": round_number, **provenance}
        )

    def write_state(self, round_number: int, state: Arrays) -> str | None:
        """Keep the strategy's state after a round beside that of the round before; gives its sha256, if there is any.

        Raises:
            ConfigError: it cannot be written.
        """
        if not state:
            return None
        content = save(dict(sorted(state.items())))
        path = self._state_file(round_number)
        with writing(path):
            replace_file(path, content)
        return hashlib.sha256(content).hexdigest()

    def read_state(self) -> Arrays:
        """The strategy's state after the last finished round; empty when it keeps none.

        Raises:
            AdapterError: it is missing, or not as it was written.
        """
        expected = self.rounds[-1].strategy_state_sha256
        if expected is None:
            return {}
        path = self._state_file(self.finished)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read: {error.strerror}; choose another run-dir") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise AdapterError(f"{path}: is not as it was written; choose another run-dir")
        return load(content)

    def finish_round(self, record: RoundRecord) -> None:
        """Note a round as finished; its adapter and the strategy's state have to be on disk."""
        append_line(self._rounds_file, record.model_dump_json())
        self.rounds.append(record)
        self._state_file(self.finished - 1).unlink(missing_ok=True)

    def last_counted(self, client_id: int) -> int:
        """The last finished round that an update of this client is part of; 0 when there is none."""
        return max((record.round_number for record in self.rounds if client_id in record.accepted), default=0)

    def write_result(self, result: RunResult) -> None:
        """Say how the run ended."""
        write_result(self.path, result)

    def _state_file(self, round_number: int) -> Path:
        return self.path / "strategy" / f"round-{round_number}.safetensors"

    @property
    def _rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    def _finished_rounds(self) -> list[RoundRecord]:
        """The rounds on disk. A last line that a crash cut short is removed, and its round is done again."""
        if not self._rounds_file.exists():
            return []
        whole, _, torn = self._rounds_file.read_bytes().rpartition(b"\n")
        try:
            rounds = [RoundRecord.model_validate_json(line) for line in whole.split(b"\n") if line]
        except ValidationError as error:
            raise ConfigError(f"{self._rounds_file}: not written by this version; choose another run-dir") from error
        if [record.round_number for record in rounds] != list(range(1, len(rounds) + 1)):
            raise ConfigError(f"{self._rounds_file}: does not hold rounds 1 to {len(rounds)}; choose another run-dir")
        if torn:
            write_atomically(self._rounds_file, whole.decode() + "\n" if whole else "")
        return rounds

    def _check_same_run(self, config: RunConfig) -> None:
        if not config.resume:
            raise ConfigError(f"{self.path} holds {self.finished} finished rounds; set resume=true or another run-dir")
        try:
            before = json.loads((self.path / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.path} holds rounds, but no readable config.json; choose another run-dir"
            ) from error
        now = config.identity()
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            changes = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)
            raise ConfigError(f"{self.path} holds rounds of another configuration ({changes}); choose another run-dir")


def write_result(run_dir: Path, result: RunResult) -> None:
    """Write ``result.json``."""
    write_atomically(run_dir / "result.json", result.model_dump_json(indent=2) + "\n")


def read_result(run_dir: Path) -> RunResult | None:
    """Read ``result.json``; None when the run did not get as far as writing it."""
    try:
        return RunResult.model_validate_json((run_dir / "result.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
