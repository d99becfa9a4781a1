"""What a demo runs, and where everything of it lies."""

from dataclasses import dataclass
from pathlib import Path

ARMS = ("clean", "none", "filter", "cai", "filter+cai")


@dataclass(frozen=True)
class DemoPlan:
    """Size and seeds of a demo; the defaults take about ten minutes on two cores.

    ``seed`` seeds the training (LoRA's initial weights, order, toy data), ``split_seed`` the split of AdvBench into
    the clients' half and the held-out half. ``limit`` cuts every evaluation set, for a quick look. Without
    ``release`` the demo ends with the report.
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
