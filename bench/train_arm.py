"""One arm of bench/train.py in a process of its own: trains a few steps, prints its figures as JSON.

    python bench/train_arm.py SPEC.json

SPEC.json is a `Spec`. Both sides get the same rows from the same prepared data, in the same order.
"""

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.batch import Batch
from cptjob_trainer.data.prepared import Prepared, load_prepared
from cptjob_trainer.model.loss import IGNORE
from cptjob_trainer.runtime import Runtime
from cptjob_trainer.training.components import assemble, make_batcher
from cptjob_trainer.training.loop import Trainer
from cptjob_trainer.training.metrics import MetricsLog


@dataclass(frozen=True)
class Spec:
    """What an arm is told. `flags` are TrainingArguments of the peer; the rest of them is default."""

    side: str  # "ours" or "peer"
    config: str
    prepared: str
    output: str
    device: str
    steps: int
    warmup: int
    attention: str | None = None
    flags: dict[str, Any] | None = None
    profile: str | None = None


# --- what is measured -----------------------------------------------------------------------------


class Meter:
    """Step times and losses, the memory of this process, and what others did to the machine."""

    def __init__(self, device: torch.device, warmup: int, last: int) -> None:
        self.device, self.warmup, self.last = device, warmup, last
        self.times: list[float] = []
        self.losses: list[torch.Tensor | float] = []
        self.own = self.busy = 0.0
        self.before = _status("VmRSS")
        with contextlib.suppress(OSError):  # peak since import is then peak since now
            Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()

    def step(self, loss: torch.Tensor | float) -> None:
        """Called after each step. A GPU is waited for at both ends of the measured steps only."""
        self.losses.append(loss)
        done = len(self.losses)
        if self.device.type == "cuda" and done in (self.warmup, self.last):
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if done == self.warmup:
            self.own, self.busy = time.process_time(), _busy_seconds()
        elif done == self.last:
            self.own, self.busy = time.process_time() - self.own, _busy_seconds() - self.busy

    def figures(self) -> dict[str, Any]:
        """seconds: of a step. memory, memory_plain: bytes. others: cores that others kept busy.

        cpu_seconds: processor time of a step over all threads, which other load hardly changes.
        """
        times = self.times[self.warmup - 1 :]
        steps = [b - a for a, b in itertools.pairwise(times)]
        # Steps of a GPU overlap with the host's, so only their sum says anything.
        seconds = (times[-1] - times[0]) / len(steps)
        peak = _status("VmHWM")
        memory, plain = peak - self.before, peak
        if self.device.type == "cuda":
            memory, plain = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        else:
            seconds = statistics.median(steps)
        return {
            "seconds": seconds,
            "steps": steps,
            "warmup_seconds": times[0] - self.start,
            "memory": memory,
            "memory_plain": plain,
            "cpu_seconds": self.own / len(steps),
            "others": max(0.0, self.busy - self.own) / (times[-1] - times[0]),
            "losses": [float(loss) for loss in self.losses],
        }


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _busy_seconds() -> float:
    """CPU seconds of the whole machine so far, and what the host took away from it."""
    user, nice, system, _, _, _, _, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(int(v) for v in (user, nice, system, steal)) / os.sysconf("SC_CLK_TCK")


# --- ours -----------------------------------------------------------------------------------------


class TimedTrainer(Trainer):
    """The product's loop without evaluations and checkpoints, which the peer does not do either."""

    meter: Meter

    def _record(self, agreed: Any, step: Any, *rest: Any) -> None:
        super()._record(agreed, step, *rest)
        self.meter.step(step.loss)

    def evaluate(self, base: Any) -> Any:
        """Nothing."""

    def _save_if_due(self) -> None:
        """Nothing."""


def train_ours(spec: Spec, config: TrainerConfig, prepared: Prepared) -> dict[str, Any]:
    """What the worker does, at one process."""
    device = torch.device(spec.device)
    meter = Meter(device, spec.warmup, spec.steps)
    components = assemble(config, prepared, Runtime.of(config.training, 0, 1, device))
    metrics = MetricsLog(Path(spec.output) / "metrics.jsonl", 0)
    trainer = TimedTrainer(components, LoopState(), metrics=metrics)
    trainer.meter = meter
    with profiled(spec.profile):
        trainer.run(None)
    components.batcher.close()
    return meter.figures()


# --- the peer -------------------------------------------------------------------------------------


class RowList(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows as the peer wants them: labels are the row's own tokens, shifted by the model.

    Positions that restart, and no attention mask, tell transformers where documents begin.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.items = [
            {
                "input_ids": batch.ids[at],
                "position_ids": batch.positions[at],
                # Ours say what follows a token; the peer's say what the token is.
                "labels": torch.cat([torch.tensor([IGNORE]), batch.targets[at, :-1]]),
            }
            for batch in batches
            for at in range(len(batch.ids))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


class Peer(transformers.Trainer):
    """Keeps the loss of each step, as a tensor: reading it would make the host wait for a GPU."""

    loss: torch.Tensor

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class OnStep(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter, self.peer = meter, None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.peer is not None
        self.meter.step(self.peer.loss)


def train_peer(spec: Spec, config: TrainerConfig, prepared: Prepared) -> dict[str, Any]:
    """transformers' Trainer with the same rows, optimizer, learning rate and clipping."""
    training = config.training
    batcher = make_batcher(config, prepared, Runtime.of(training, 0, 1, torch.device(spec.device)))
    rows = RowList([m for step in range(spec.steps) for m in batcher.step(step).micro_batches])
    batcher.close()
    meter = Meter(torch.device(spec.device), spec.warmup, spec.steps)
    lm = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation=spec.attention
    )
    arguments = TrainingArguments(
        output_dir=spec.output,
        max_steps=spec.steps,
        per_device_train_batch_size=training.batch_size_per_device,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=training.optimizer.weight_decay,
        adam_beta1=training.optimizer.betas[0],
        adam_beta2=training.optimizer.betas[1],
        adam_epsilon=training.optimizer.eps,
        max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=True,
        use_cpu=spec.device == "cpu",
        **(spec.flags or {}),
    )
    on_step = OnStep(meter)
    peer = Peer(model=lm, args=arguments, train_dataset=rows, callbacks=[on_step])
    on_step.peer = peer
    with profiled(spec.profile):
        peer.train()
    return meter.figures()


@contextlib.contextmanager
def profiled(path: str | None) -> Any:
    """Write a table of operators to `path`."""
    if path is None:
        yield
        return
    from torch.profiler import profile

    with profile(profile_memory=True) as profiler:
        yield
    averages = profiler.key_averages()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    Path(path).write_text(averages.table(sort_by=key, row_limit=60))


def main() -> None:
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    config = TrainerConfig.load(spec.config)
    prepared = load_prepared(Path(spec.prepared))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(config.training.seed)
    if spec.side == "ours":
        # As the worker sets it; the peer has a flag for it.
        torch.set_float32_matmul_precision("high")
    train = train_ours if spec.side == "ours" else train_peer
    print(json.dumps(train(spec, config, prepared)))


if __name__ == "__main__":
    main()
