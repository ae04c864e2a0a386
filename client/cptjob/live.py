"""What a person sees while a job runs: a bar on a terminal, plain lines elsewhere."""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from cptjob_trainer.training.narrator import Narrator, describe


class _Console(Console):
    """Standard error, and nothing once nobody reads that: a run does not end with `| head`."""

    def on_broken_pipe(self) -> None:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        os.close(silence)


def console() -> Console:
    """Where a person sees a run."""
    return _Console(stderr=True)


class LiveDisplay:
    """Shows the answers of the coordinator's /progress. Writes to ``console`` (stderr)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lines = Narrator(self.say)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=max(5, min(24, self._console.width // 8))),
                # What does not fit stands in a second line; nothing is cut off.
                TextColumn("{task.fields[details]}", table_column=Column(ratio=1)),
                expand=True,
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("Starting", total=100.0, details="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Mapping[str, Any]) -> None:
        """Shows one report."""
        phase = str(progress.get("phase", ""))
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=phase,
                completed=float(progress.get("progressPercentage") or 0.0),
                details=describe(progress),
            )
            return
        self._lines.tell(phase, lambda: describe(progress))

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
