"""The demo's progress on the terminal: a line for each finished stage, and one bar with the time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Stages:
    """Shows which stage runs, how much is done, and how long the rest may take."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(compact=True))  # fmt: skip
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=total)
        self._stage: str | None = None
        self._began = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def begin(self, stage: str) -> None:
        """The stage before is done; this one begins."""
        self._finish()
        self._stage, self._began = stage, time.monotonic()
        self._progress.update(self._task, description=stage)

    def step(self, detail: str | None = None) -> None:
        """One step of the whole is done; ``detail`` says what is next."""
        self._progress.advance(self._task)
        if detail:
            self._progress.update(self._task, description=f"{self._stage}: {detail}")

    def _finish(self) -> None:
        if self._stage:
            self._console.print(f"[green]✓[/] {self._stage} [dim]({time.monotonic() - self._began:.0f} s)[/]")
        self._stage = None
