"""The per-sample log of one evaluation: appended to while it runs, so that a killed run goes on where it stopped."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evaluation.files import read_json, read_jsonl, write_json, write_jsonl
from evaluation.scoring import Sample
from services.contracts.errors import ConfigError

SAMPLES = "samples.jsonl"
IDENTITY = "run.json"


class RunIdentity(BaseModel):
    """What has to be the same for a run to be continued; addresses may change between the two."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    model: str
    judge_sha256: str
    arm: str | None
    round: int | None
    max_tokens: int
    sets: dict[str, str]


class SampleLog:
    """``samples.jsonl`` in a folder that belongs to one evaluation.

    Opening it keeps the samples of an earlier, interrupted run, except for unscored ones, which are asked again.

    Raises:
        ConfigError: the folder holds an evaluation with other settings.
        DataError: ``samples.jsonl`` is malformed elsewhere than in a last line that was cut off.
    """

    def __init__(self, folder: Path, identity: RunIdentity) -> None:
        self._path = folder / SAMPLES
        self.samples: dict[str, Sample] = {}
        _claim(folder, identity)
        if self._path.exists():
            earlier = read_jsonl(self._path, Sample, drop_partial_end=True)
            self.samples = {sample.id: sample for sample in earlier if sample.scored}
        write_jsonl(self._path, self.samples.values())

    def append(self, samples: Iterable[Sample]) -> None:
        """Add samples and write them through to the file."""
        found = list(samples)
        self.samples.update((sample.id, sample) for sample in found)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(sample.model_dump_json() + "\n" for sample in found)

    def finish(self, order: Iterable[str]) -> list[Sample]:
        """Rewrite the file with one line for each of these ids, in this order, and return the samples."""
        ordered = [self.samples[sample_id] for sample_id in order]
        write_jsonl(self._path, ordered)
        return ordered


def _claim(folder: Path, identity: RunIdentity) -> None:
    path = folder / IDENTITY
    if not path.exists():
        write_json(path, identity)
        return
    earlier = read_json(path, RunIdentity).model_dump()
    wanted = identity.model_dump()
    changed = [f"{key} was {earlier[key]!r}, is {wanted[key]!r}" for key in wanted if earlier[key] != wanted[key]]
    if changed:
        reason = "; ".join(changed)
        raise ConfigError(f"{folder} holds another evaluation ({reason}); choose another --out", param="out")
