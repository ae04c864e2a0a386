"""`metrics.jsonl`: one line per step or evaluation, of one lineage."""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cptjob_trainer.disk import is_full
from cptjob_trainer.errors import OutputError, StorageFullError

log = logging.getLogger(__name__)

#: Somebody may look at the curves while they grow; torch's own two minutes are long for that.
_FLUSH_SECONDS = 10


class MetricsLog:
    """Appends JSON lines. Opened at a step, it first drops what an abandoned attempt wrote beyond it."""

    def __init__(
        self, path: Path, step: int, events: Path | None = None, *, evaluated: bool = True
    ) -> None:
        """`events`: a folder that gets the same numbers as TensorBoard event files.

        evaluated: whether an evaluation of `step` itself is kept too.
        """
        self._path = path
        with self._on_disk():
            self._open(path, step, evaluated)
        self._events: Any = None
        if events is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._spare_events():
                self._events = SummaryWriter(
                    str(events), purge_step=step + 1, flush_secs=_FLUSH_SECONDS
                )

    def _open(self, path: Path, step: int, evaluated: bool) -> None:
        # One after the other: a long run has more of them than fit into memory as objects.
        lines = (line for line in read_metrics(path) if line["step"] <= step)
        kept = (x for x in lines if evaluated or x["step"] < step or "evaluation" not in x)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        temporary.replace(path)
        self._file = path.open("a")

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_full(error):
                raise StorageFullError(
                    f"{self._path}: no space is left; free some and run the same command again: it "
                    "goes on from the last checkpoint"
                ) from error
            raise OutputError(f"{self._path}: cannot be written: {error.strerror}") from error

    @contextmanager
    def _spare_events(self) -> Iterator[None]:
        """Events that cannot be written end here, and not the run: they only repeat the lines."""
        try:
            yield
        except OSError as error:
            self._events = None
            log.warning(
                "TensorBoard's events cannot be written (%s), there will be no more of them; %s has "
                "every figure",
                error.strerror,
                self._path,
            )

    def write(self, **values: Any) -> None:
        """One line, at once visible to readers."""
        with self._on_disk():
            self._file.write(json.dumps(finite(values)) + "\n")
            self._file.flush()
        if self._events is not None:
            with self._spare_events():
                for name, number in _scalars(values):
                    self._events.add_scalar(name, number, values["step"])

    def close(self) -> None:
        if self._events is not None:
            with self._spare_events():
                self._events.close()
        with self._on_disk():
            os.fsync(self._file.fileno())
            self._file.close()


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has no numbers for, at any depth."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: dict[str, Any], group: str = "train") -> Iterator[tuple[str, float]]:
    """Numbers of a line as TensorBoard's `group/name`; a table in the line is a group of its own."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield f"{group}/{name}", float(value)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
