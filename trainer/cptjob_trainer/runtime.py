"""Where and how one process computes, and what it tells the others in numbers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cptjob_trainer.config import Training


@dataclass(frozen=True)
class Runtime:
    """One process among `world`, with the process group already made where there are others.

    `sharded`: the model is shared between the ranks by FSDP2, whose policy then casts to `dtype`.
    """

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    sharded: bool

    @classmethod
    def of(cls, training: Training, rank: int, world: int, device: torch.device) -> "Runtime":
        """As a run's settings want it: sharded where there is more than one process."""
        return cls(rank, world, device, compute_dtype(training, device), sharded=world > 1)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        if self.sharded or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on this rank's device. Collective; may change `values`."""
        if self.world == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def counts(self, values: Sequence[int]) -> list[int]:
        """Whole numbers of the hosts, summed over all ranks; no device is waited for. Collective."""
        summed = torch.tensor(values)
        if self.world > 1:
            dist.all_reduce(summed)
        return [int(value) for value in summed.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any rank. Collective."""
        return flag if self.world == 1 else self.counts([int(flag)])[0] > 0

    def all(self, flag: bool) -> bool:
        """Whether `flag` is set in every rank. Collective."""
        return not self.any(not flag)


def compute_dtype(training: Training, device: torch.device) -> torch.dtype:
    """Auto: bf16 on a GPU; fp32 on a CPU, where runs are then repeatable bit for bit."""
    if training.precision == "Auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if training.precision == "BFloat16" else torch.float32
