"""What rank 0 tells the outside while it trains: progress into the store, at most twice a second,

and into its log, a line every ten seconds and for whatever is new.
"""

import logging
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cptjob_trainer.checkpoint.checkpoints import Resume, Saved
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.training.narrator import Narrator, describe
from cptjob_trainer.training.progress import (
    CheckpointRef,
    NodeRanks,
    Phase,
    Progress,
    StorePublisher,
)

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.5
# Speed, and the estimate of what remains, follow about this many steps.
SMOOTHING_STEPS = 20
STORE_VARIABLE = "CPTJOB_STORE"


class Reporter:
    """Progress of one process; silent in all ranks but 0. Where there is no store it only logs."""

    def __init__(self, rank: int, flops_per_token: float, peak_flops: float | None, epochs: float):
        address = os.environ.get(STORE_VARIABLE, "") if rank == 0 else ""
        self._publisher = StorePublisher(address) if address else None
        self._narrator = Narrator(log.info) if rank == 0 else None
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._epochs = epochs
        self._progress = Progress(phase="Loading")
        self._sent = 0.0
        self._steps = 0
        self._seconds_per_step = 0.0
        self._tokens_per_step = 0.0

    def mfu(self, tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilisation: achieved over peak, None where the device's peak is not known."""
        if self._peak_flops is None or seconds <= 0:
            return None
        return tokens * self._flops_per_token / seconds / self._peak_flops

    def phase(self, phase: Phase, message: str = "") -> None:
        self._update(phase=phase, message=message)
        self._send(force=True)

    def nodes(self, names: Sequence[str]) -> None:
        """names: of each rank's node, in the order of ranks."""
        ranks: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            ranks.setdefault(name, []).append(rank)
        nodes = tuple(NodeRanks(name=name, ranks=tuple(found)) for name, found in ranks.items())
        self._update(nodes=nodes)

    def start(self, step: int, total_steps: int) -> None:
        """The step to begin from, before the first is done."""
        self._update(current_step=step, total_steps=total_steps)
        self._send(force=True)

    def step(self, state: LoopState, total_steps: int, values: dict[str, Any]) -> None:
        seconds = values["seconds"] + values["dataWait"]
        # The first steps of a process are slow, and the last step of a run may be nearly empty.
        share = max(1.0 / SMOOTHING_STEPS, 1.0 / (self._steps + 1))
        self._steps += 1
        self._seconds_per_step += share * (seconds - self._seconds_per_step)
        self._tokens_per_step += share * (values["tokens"] - self._tokens_per_step)
        numbers = ("loss", "learningRate", "gradNorm", "dataWait", "padding", "mfu")
        metrics = {n: values[n] for n in numbers if values.get(n) is not None}
        done = state.step / total_steps
        self._update(
            phase="Training",
            message="",
            current_step=state.step,
            total_steps=total_steps,
            epoch=self._epochs * done,
            progress_percentage=100.0 * done,
            estimated_remaining_seconds=(total_steps - state.step) * self._seconds_per_step,
            tokens_per_second=self._tokens_per_step / max(self._seconds_per_step, 1e-9),
            metrics=self._progress.metrics | metrics,
        )
        self._send(force=state.step == total_steps)

    def evaluation(self, values: dict[str, float]) -> None:
        self._update(metrics=self._progress.metrics | values)
        log.info("step %d: %s", self._progress.current_step, _figures(values))
        self._send(force=True)

    def saved(self, saved: Saved) -> None:
        self._checkpoint(saved.step, saved.path, datetime.now(UTC))

    def resumed(self, found: Resume) -> None:
        """The run goes on from this one, which is the last for now."""
        written = datetime.fromtimestamp(found.path.stat().st_mtime, UTC)
        self._checkpoint(found.step, found.path, written)

    def _checkpoint(self, step: int, path: Path, time: datetime) -> None:
        reference = CheckpointRef(step=step, time=time, uri=path.absolute().as_uri())
        self._update(last_checkpoint=reference)
        self._send(force=True)

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()

    def _update(self, **values: Any) -> None:
        self._progress = self._progress.model_copy(
            update=values | {"last_updated_time": datetime.now(UTC)}
        )
        if self._narrator is not None:
            self._narrator.tell(self._progress.phase, self._words)

    def _words(self) -> str:
        return describe(self._progress.model_dump(by_alias=True))

    def _send(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._publisher is not None and (force or now - self._sent >= INTERVAL_SECONDS):
            self._sent = now
            self._publisher.publish(self._progress)


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
