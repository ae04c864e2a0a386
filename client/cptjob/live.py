"""What a person sees while a job runs: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

#: Seconds between two plain lines while nothing but numbers changes.
LINE_SECONDS = 10.0


class LiveDisplay:
    """Shows the answers of the coordinator's /progress. Writes to ``console`` (stderr)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = ""
        self._last_time = 0.0
        self._last_phase = ""

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
        phase, details = str(progress.get("phase", "")), describe(progress)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=phase,
                completed=float(progress.get("progressPercentage") or 0.0),
                details=details,
            )
            return
        now = time.monotonic()
        line = f"{phase}: {details}" if details else phase
        due = phase != self._last_phase or now - self._last_time >= LINE_SECONDS
        if line != self._last_line and due:
            self.say(line)
            self._last_line, self._last_phase, self._last_time = line, phase, now

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(progress: Mapping[str, Any]) -> str:
    """Step of total, loss, tokens/s, time left and last checkpoint, as far as they are known."""
    metrics = progress.get("metrics") or {}
    checkpoint = progress.get("lastCheckpoint")
    parts: list[str] = []
    if progress.get("message"):
        parts.append(str(progress["message"]))
    total = progress.get("totalSteps")
    if total:
        parts.append(f"step {progress.get('currentStep', 0)} of {total}")
    elif progress.get("phase") == "Preparing" and progress.get("progressPercentage"):
        parts.append(f"{progress['progressPercentage']:.0f} %")
    if isinstance(metrics.get("loss"), int | float):
        parts.append(f"loss {metrics['loss']:.4f}")
    if progress.get("tokensPerSecond"):
        parts.append(f"{si(progress['tokensPerSecond'])} tokens/s")
    if progress.get("estimatedRemainingSeconds") is not None and total:
        parts.append(f"ETA {duration(progress['estimatedRemainingSeconds'])}")
    if checkpoint:
        parts.append(f"checkpoint at step {checkpoint.get('step')}")
    return ", ".join(parts)


def si(value: float) -> str:
    """1234 -> 1.2k; three digits at most before the letter."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text
