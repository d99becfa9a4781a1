"""What a demo runs, and where everything of it lies."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from services.contracts.errors import ConfigError

GATE_SAMPLES = 50  # the least number of prompts of a set that `python -m trainer promote` takes
ARMS = ("clean", "none", "filter", "cai", "filter+cai")


@dataclass(frozen=True)
class DemoPlan:
    """Size and seeds of a demo; the defaults take about seven minutes on two cores.

    ``seed`` seeds the training (LoRA's initial weights, order, toy data), ``split_seed`` the split of AdvBench into
    the clients' half and the held-out half. ``limit`` cuts every evaluation set, for a quick look. Without
    ``release`` the demo ends with the report. Raises ConfigError when ``limit`` and ``release`` contradict each other.
    """

    out: Path
    seed: int = 0
    split_seed: int = 0
    rounds: int = 3
    clients: int = 8
    samples_per_client: int = 48
    harmful_share: float = 0.3
    arms: tuple[str, ...] = ARMS
    limit: int | None = None
    benchmarks: Path | None = None
    release: bool = True

    def __post_init__(self) -> None:
        if self.release and self.limit is not None and self.limit < GATE_SAMPLES:
            raise ConfigError(
                f"--limit {self.limit} leaves too few prompts for the release gate, which wants {GATE_SAMPLES}; "
                "add --no-release, or raise the limit"
            )

    @property
    def note(self) -> Path:
        """Where the run folder says which plan it belongs to."""
        return self.out / "plan.json"

    @property
    def last_file(self) -> Path:
        """What is written last: a demo that has it is finished."""
        return self.out / ("chats.jsonl" if self.release else "summary.json")

    def identity(self) -> str:
        """The plan as JSON with absolute paths; two demos of one folder must not differ in it."""
        return json.dumps(asdict(self), default=lambda path: str(path.resolve()), indent=2)

    def is_finished(self) -> bool:
        """Whether the run folder holds all of this demo.

        Raises:
            ConfigError: it holds a demo of another plan.
        """
        if self.note.exists() and self.note.read_text(errors="replace") != self.identity():
            raise ConfigError(f"{self.out} holds a demo of another plan (see {self.note}); choose another folder")
        return self.last_file.exists()

    def arm_dir(self, arm: str) -> Path:
        """The trainer's run folder of an arm."""
        return self.out / "arms" / arm

    def adapter_dir(self, arm: str, round_number: int) -> Path:
        """The adapter of an arm after a round."""
        return self.arm_dir(arm) / "adapters" / f"round-{round_number}"

    def steps(self) -> int:
        """How many steps the progress bar has: every round is trained and evaluated, and the base is evaluated."""
        return 2 * self.rounds * len(self.arms) + 1


@dataclass(frozen=True)
class DemoData:
    """The files that a demo's federations and evaluations read."""

    harmful: Path
    benign: Path
    red_team: Path
    replay: Path
    heldout: Path | None
