"""Held-out loss, for domain and general text, as numbers and as a difference to the base model."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from cptjob_trainer.data import arrange, empty_row, padded_length, to_device
from cptjob_trainer.model import LossModel, autocast

# Evaluation may cost this share of a run's time. A row costs a third of what it costs in training
# (forward 1, backward 2), and a run has two evaluations at least.
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


def rows_per_source(total_rows: int, available: int, sources: int) -> int:
    """Rows of one of `sources` held-out sources that are used: within the time share, from 8 to 512.

    Two evaluations of all sources, at a third of the price, fit into the share; a run of few rows
    takes 8 of each source nevertheless, or the figures would be noise.
    """
    affordable = math.ceil(TIME_SHARE * 1.5 * total_rows / sources)
    return min(available, max(ROWS_AT_LEAST, min(ROWS_AT_MOST, affordable)))


class Evaluator:
    """Evaluates the same rows each time, shared between the ranks."""

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        total_rows: int,
        micro_batch: int,
        max_length: int,
        pad_id: int,
        packed: bool,
        documents: bool,
        rank: int,
        world: int,
        device: torch.device,
        dtype: torch.dtype,
        sharded: bool,
    ) -> None:
        self.sources = [s for s in sources if s.rows() > 0]
        self.counts = [
            rows_per_source(total_rows, source.rows(), len(self.sources)) for source in self.sources
        ]
        self.micro_batch, self.max_length, self.pad_id = micro_batch, max_length, pad_id
        self.packed, self.documents = packed, documents
        self.rank, self.world = rank, world
        self.device, self.dtype, self.sharded = device, dtype, sharded

    def run(self, model: LossModel) -> HeldOut:
        """Held-out losses. Collective: every rank makes the same number of forward passes."""
        model.eval()
        sums = torch.zeros(len(self.sources), 2, dtype=torch.float64)
        with torch.no_grad():
            for at in range(len(self.sources)):
                sums[at] = self._source(model, at)
        model.train()
        if self.sharded:
            # After a forward pass without a backward pass FSDP leaves the root's parameters whole,
            # and whoever asks for the parameters next would get those instead of the shards.
            cast(FSDPModule, model).reshard()
        if self.world > 1:
            # Loss sums cross ranks in fp64 on the CPU side where the backend allows it.
            moved = sums.to(self.device) if self.device.type == "cuda" else sums
            dist.all_reduce(moved)
            sums = moved.cpu()
        return self._summarise(sums)

    def _source(self, model: LossModel, at: int) -> torch.Tensor:
        source, count = self.sources[at], self.counts[at]
        loss, targets = 0.0, 0
        stride = self.world * self.micro_batch
        for start in range(0, count, stride):
            first = start + self.rank * self.micro_batch
            numbers = range(first, first + self.micro_batch)
            # Spread over the source, not its first rows: neighbours in a file are alike.
            rows = [
                source.row(n * source.rows() // count) if n < count else empty_row()
                for n in numbers
            ]
            length = padded_length(rows, self.max_length, self.packed)
            arranged = arrange(rows, numbers, length, self.pad_id)
            with autocast(self.device, self.dtype, self.sharded):
                batch = to_device(arranged, self.device, self.documents)
                loss += float(model(batch))
            targets += arranged.targets_count()
        return torch.tensor([loss, targets], dtype=torch.float64)

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
        return HeldOut(value["byRole"], value["bySource"], value["tokens"]), value["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_base(path: Path, base: HeldOut, seconds: float) -> None:
    """Keep it beside the prepared data, whole or not at all."""
    value = {
        "byRole": base.by_role,
        "bySource": base.by_source,
        "tokens": base.tokens,
        "seconds": seconds,
    }
    # Several pods may share the prepared data, and all of them may be process 1.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".base-", delete=False) as file:
        json.dump(value, file)
    Path(file.name).replace(path)
