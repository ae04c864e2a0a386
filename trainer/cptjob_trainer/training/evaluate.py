"""Held-out loss, for domain and general text, as numbers and as a difference to the base model."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule

from cptjob_trainer import unfinished
from cptjob_trainer.data.batch import Batch, BatchShape, empty_row
from cptjob_trainer.model.causal import LossModel
from cptjob_trainer.runtime import Runtime
from cptjob_trainer.training.metrics import finite

log = logging.getLogger(__name__)

# Evaluation may cost this share of the time of one epoch. A row costs a third of what it costs in
# training (forward 1, backward 2), and a run has two evaluations at least.
TIME_SHARE = 0.03
ROWS_AT_LEAST = 8
ROWS_AT_MOST = 512


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss: mean over target tokens, by role ("Domain", "General") and by source."""

    by_role: dict[str, float]
    by_source: dict[str, float]
    tokens: int

    def metrics(self) -> dict[str, float]:
        """For metrics and progress: heldout_domain_loss, heldout_general_loss, heldout/<source>."""
        values = {f"heldout_{role.lower()}_loss": loss for role, loss in self.by_role.items()}
        return values | {f"heldout/{name}": loss for name, loss in self.by_source.items()}


def rows_per_source(domain_rows: int, available: int, sources: int) -> int:
    """Rows of one of `sources` held-out sources that are used: within the time share, from 8 to 512.

    Two evaluations of all sources, at a third of the price, fit into the share of one epoch; of few
    rows 8 of each source are taken nevertheless, or the figures would be noise. Epochs, steps and
    weights decide nothing: losses of two jobs on the same data are of the same rows.
    """
    affordable = math.ceil(TIME_SHARE * 1.5 * domain_rows / sources)
    return min(available, max(ROWS_AT_LEAST, min(ROWS_AT_MOST, affordable)))


class Interrupted(Exception):
    """An evaluation that was left because a stop was asked for."""


class Evaluator:
    """Evaluates the same rows each time, shared between the ranks.

    `domain_rows`: how many rows the domain text has to train on, each once.
    """

    def __init__(
        self, sources: Sequence[Any], shape: BatchShape, runtime: Runtime, domain_rows: int
    ) -> None:
        self.sources = [s for s in sources if s.rows() > 0]
        self.counts = [
            rows_per_source(domain_rows, source.rows(), len(self.sources))
            for source in self.sources
        ]
        self.shape, self.runtime = shape, runtime

    def run(self, model: LossModel, stop_asked: Callable[[], bool] = lambda: False) -> HeldOut:
        """Held-out losses. Collective: every rank makes the same number of forward passes.

        Raises Interrupted before the next pass once `stop_asked` says so in any rank.
        """
        sums = torch.zeros(len(self.sources), 2, dtype=torch.float64)
        model.eval()
        try:
            with torch.no_grad():
                for at in range(len(self.sources)):
                    sums[at] = self._source(model, at, stop_asked)
        finally:
            model.train()
            if self.runtime.sharded:
                # After a forward pass without a backward pass FSDP leaves the root's parameters
                # whole, and whoever asks for the parameters next would get those, not the shards.
                cast(FSDPModule, model).reshard()
        return self._summarise(self.runtime.sum(sums).cpu())

    def _source(self, model: LossModel, at: int, stop_asked: Callable[[], bool]) -> torch.Tensor:
        count, runtime = self.counts[at], self.runtime
        loss, targets = 0.0, 0
        for start in range(0, count, runtime.world * self.shape.micro_batch):
            if runtime.any(stop_asked()):
                raise Interrupted
            batch = self._batch(at, start + runtime.rank * self.shape.micro_batch)
            with runtime.autocast():
                loss += float(model(batch.to(runtime.device, model.documents)))
            targets += batch.targets_count()
        return torch.tensor([loss, targets], dtype=torch.float64)

    def _batch(self, at: int, first: int) -> Batch:
        """Held-out rows from number `first` on; beyond the last they are empty."""
        source, count = self.sources[at], self.counts[at]
        numbers = range(first, first + self.shape.micro_batch)
        # Spread over the source, not its first rows: neighbours in a file are alike.
        rows = [
            source.row(n * source.rows() // count) if n < count else empty_row() for n in numbers
        ]
        return self.shape.arrange(rows, numbers)

    def _summarise(self, sums: torch.Tensor) -> HeldOut:
        by_source, roles = {}, dict[str, list[float]]()
        for source, (loss, targets) in zip(self.sources, sums.tolist(), strict=True):
            if targets == 0:
                continue
            by_source[source.name] = loss / targets
            total = roles.setdefault(source.role, [0.0, 0.0])
            total[0] += loss
            total[1] += targets
        by_role = {role: loss / targets for role, (loss, targets) in roles.items()}
        return HeldOut(by_role, by_source, int(sums[:, 1].sum()))


def load_base(path: Path) -> tuple[HeldOut, float] | None:
    """The base model's held-out loss and the seconds it took, when an earlier run measured it."""
    try:
        value = json.loads(path.read_text())
        by_role, by_source = _losses(value["byRole"]), _losses(value["bySource"])
        return HeldOut(by_role, by_source, value["tokens"]), value["seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _losses(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def save_base(path: Path, base: HeldOut, seconds: float) -> None:
    """Keep it beside the prepared data, whole or not at all; without it the next run measures anew."""
    value = {
        "byRole": base.by_role,
        "bySource": base.by_source,
        "tokens": base.tokens,
        "seconds": seconds,
    }
    temporary = unfinished.path_in(path.parent)
    try:
        temporary.write_text(json.dumps(finite(value)) + "\n")
        temporary.replace(path)
    except OSError as error:
        log.warning("%s: the base model's losses are not kept: %s", path, error.strerror)
        temporary.unlink(missing_ok=True)
