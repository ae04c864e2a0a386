"""Progress in words: a line for each report that is worth one, as logs and terminals show it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

#: Seconds between two lines while nothing but numbers changes.
LINE_SECONDS = 10.0


class Narrator:
    """Says a report in one line when its phase is new, and again every `LINE_SECONDS`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last_line = ""
        self._last_phase = ""
        self._last_time = 0.0

    def tell(self, phase: str, details: Callable[[], str], *, now: bool = False) -> None:
        """`details` is called only when a line is due, or wanted `now`; a line is not said twice."""
        elapsed = time.monotonic() - self._last_time
        if not now and phase == self._last_phase and elapsed < LINE_SECONDS:
            return
        said = details()
        line = f"{phase}: {said}" if said else phase
        if line != self._last_line:
            self._say(line)
            self._last_line, self._last_phase = line, phase
            self._last_time = time.monotonic()


def describe(progress: Mapping[str, Any]) -> str:
    """Step of total, loss, tokens/s, time left and last checkpoint, as far as they are known.

    progress: a report by the names of its JSON.
    """
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
