"""What the ranks of one run tell each other beside tensors: JSON values and failures, no pickles.

torch's own object collectives pickle what they send. These send JSON as bytes, and they carry
errors: when one rank fails, every rank raises the same error, and none is left waiting.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from cptjob_trainer import errors
from cptjob_trainer.errors import CPTJobError

# A slow volume may keep one rank writing for long after another is done.
_PATIENCE = timedelta(hours=2)


class Ranks:
    """This process among `world` others. With `world` 1 nothing of torch.distributed is needed.

    Making one is collective: all ranks make it at the same point. It talks over gloo in a group of
    its own, so it may be used from another thread than the training's and beside NCCL.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world
        self.group: dist.ProcessGroup | None = None
        if world > 1:
            self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def first(self) -> bool:
        """True in the one rank that decides and publishes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), in the order of ranks, on every rank.

        Raises RankLostError when one of them has gone.
        """
        if self.world == 1:
            return [value]
        try:
            return self._exchange(json.dumps(value).encode())
        except RuntimeError as error:
            raise errors.RankLostError(
                f"rank {self.rank} lost another rank, whose own message or log says why; run the "
                f"job again to continue ({str(error).strip().partition(chr(10))[0]})"
            ) from error

    def _exchange(self, content: bytes) -> list[Any]:
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([text.numel()]), group=self.group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: text.numel()] = text
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return [
            json.loads(part[: int(length)].numpy().tobytes())
            for part, length in zip(parts, lengths, strict=True)
        ]

    def each(self, act: Callable[[], Any]) -> list[Any]:
        """Run `act` in every rank, gather the values; all raise the lowest failing rank's error."""
        outcome = _attempt(act)
        outcomes = self.gather(outcome.report)
        for number, report in enumerate(outcomes):
            if "error" in report:
                if number == self.rank and isinstance(outcome.error, CPTJobError):
                    raise outcome.error
                raise _rebuild(number, report["error"]) from outcome.error
        return [report["value"] for report in outcomes]

    def once(self, act: Callable[[], Any]) -> Any:
        """Run `act` in rank 0; its value, or its error, is that of every rank."""
        return self.each(lambda: act() if self.first else None)[0]


class _Outcome:
    def __init__(self, report: dict[str, Any], error: Exception | None = None) -> None:
        self.report = report
        self.error = error


def _attempt(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome({"value": act()})
    except Exception as error:
        return _Outcome({"error": {"kind": type(error).__name__, "message": str(error)}}, error)


def _rebuild(rank: int, report: dict[str, str]) -> Exception:
    """The same error as in the rank that met it, as far as it is one of ours."""
    kind = getattr(errors, report["kind"], None)
    if isinstance(kind, type) and issubclass(kind, CPTJobError):
        try:
            return kind(report["message"])
        except TypeError:
            pass
    return CPTJobError(f"rank {rank} failed: {report['kind']}: {report['message']}")
