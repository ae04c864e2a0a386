"""The training loop: a step that can be read aloud, and evaluation, saving and reports around it."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from cptjob_trainer import failpoints
from cptjob_trainer.checkpoint.checkpoints import Saved
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.data.batcher import StepRows
from cptjob_trainer.errors import Stopped
from cptjob_trainer.model import dropout
from cptjob_trainer.model.causal import trainable
from cptjob_trainer.training.components import Components
from cptjob_trainer.training.evaluate import TIME_SHARE, HeldOut, Interrupted
from cptjob_trainer.training.metrics import MetricsLog, finite
from cptjob_trainer.training.optimizer import clip_gradients, set_learning_rate
from cptjob_trainer.training.schedule import default_warmup, learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one step did, summed over all ranks."""

    loss: float
    grad_norm: float
    learning_rate: float
    targets: int
    skipped: bool


@dataclass(frozen=True)
class Agreed:
    """What all ranks know before a step."""

    targets: int
    filled: int
    stop: bool
    evaluate: bool
    tokens_by_source: dict[str, int]


class Trainer:
    """Trains from `state.step` to `total_steps`, and can be asked to stop between two steps."""

    def __init__(
        self,
        components: Components,
        state: LoopState,
        *,
        stop_asked: Callable[[], bool] = lambda: False,
        metrics: MetricsLog | None = None,
    ) -> None:
        """`stop_asked` of any rank stops all; `metrics` is rank 0's."""
        self.config, self.runtime = components.config, components.runtime
        self.model, self.optimizer = components.model, components.optimizer
        self.batcher, self.evaluator = components.batcher, components.evaluator
        self.checkpoints, self.reporter = components.checkpoints, components.reporter
        self.total_steps, self.tensors = components.total_steps, components.tensors
        self.state, self.stop_asked, self.metrics = state, stop_asked, metrics
        self.source_names = [source.name for source in self.batcher.sources]
        self.parameters = [parameter for _, parameter in trainable(self.model)]
        warmup = self.config.training.schedule.warmup_steps
        self.warmup_steps = default_warmup(self.total_steps) if warmup is None else warmup

    # --- the step -----------------------------------------------------------------------------

    def step(self, rows: StepRows, targets: int) -> Step:
        """One optimizer step over this rank's rows; `targets` counts those of all ranks."""
        rate = self.learning_rate(self.state.step)
        set_learning_rate(self.optimizer, rate)
        loss = torch.zeros((), device=self.runtime.device)
        for at, micro in enumerate(rows.micro_batches):
            # Long steps must not outlast the grace period.
            if at > 0 and self.runtime.any(self.stop_asked()):
                self.optimizer.zero_grad(set_to_none=True)
                self._stop()
            batch = micro.to(self.runtime.device, self.model.documents)
            with dropout.keyed(self.config.training.seed, batch.numbers, self.model.dropping):
                with self.runtime.autocast():
                    # Divided by the targets of the whole batch: every token of a step counts the
                    # same, whatever row, rank or micro-batch it is in.
                    part = self.model(batch) / max(1, targets)
                part.backward()
            loss += part.detach()
        norm = clip_gradients(self.parameters, self.config.training.max_grad_norm)
        loss = self.runtime.sum(loss)
        # The one moment of a step at which the host waits for the device.
        total_loss, total_norm = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        skipped = self.config.training.guards.skip_non_finite and not math.isfinite(total_norm)
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(total_loss, total_norm, rate, targets, skipped)

    def learning_rate(self, step: int) -> float:
        training = self.config.training
        return learning_rate(
            training.schedule.type,
            step,
            self.total_steps,
            peak=training.learning_rate,
            floor=training.schedule.min_learning_rate,
            warmup_steps=self.warmup_steps,
            constant_steps=training.schedule.constant_steps,
        )

    def _agree(self, rows: StepRows) -> Agreed:
        """Sums over ranks before a step, in one small reduction: counts, and what any rank wants."""
        counts = [rows.tokens_by_source.get(at, 0) for at in range(len(self.source_names))]
        # Only rank 0's clock decides on an evaluation: ranks of two minds would wait for ever.
        due = self.runtime.rank == 0 and self._evaluation_due()
        values = [rows.targets, rows.filled, int(self.stop_asked()), int(due), *counts]
        targets, filled, stops, evaluations, *tokens = self.runtime.counts(values)
        named = zip(self.source_names, tokens, strict=True)
        by_source = {name: count for name, count in named if count}
        return Agreed(targets, filled, stops > 0, evaluations > 0, by_source)

    # --- around the step ----------------------------------------------------------------------

    def run(self, base: HeldOut | None) -> None:
        """Train to the end, with evaluations and checkpoints. Raises Stopped after a stop was asked."""
        failpoints.hit("train.start")
        self.model.train()
        if self.state.evaluation_pending:
            self.evaluate(base)
        waited = time.monotonic()
        for rows in self.batcher.steps(self.state.step, self.total_steps):
            began = time.monotonic()
            data_wait = began - waited
            agreed = self._agree(rows)
            if agreed.stop:
                self._stop()
            failpoints.hit("train.step")
            result = self.step(rows, agreed.targets)
            seconds = time.monotonic() - began
            self._record(agreed, result, rows.slots, seconds, data_wait)
            if agreed.evaluate or self.state.step == self.total_steps:
                self.evaluate(base)
            self._save_if_due()
            waited = time.monotonic()

    def _record(
        self, agreed: Agreed, step: Step, slots: int, seconds: float, data_wait: float
    ) -> None:
        self._count(agreed, step, seconds + data_wait)
        tokens = sum(agreed.tokens_by_source.values())
        values: dict[str, Any] = {
            "loss": step.loss if math.isfinite(step.loss) else None,
            "learningRate": step.learning_rate,
            "gradNorm": step.grad_norm if math.isfinite(step.grad_norm) else None,
            "tokens": tokens,
            "tokensBySource": agreed.tokens_by_source,
            "tokensPerSecond": tokens / max(seconds + data_wait, 1e-9),
            "seconds": seconds,
            "dataWait": data_wait,
            "padding": 1.0 - agreed.filled / max(1, slots * self.runtime.world),
            "mfu": self.reporter.mfu(agreed.filled, seconds + data_wait),
        }
        if step.skipped:
            values["skipped"] = True
        if self.metrics is not None:
            self.metrics.write(step=self.state.step, **values)
        self.reporter.step(self.state, self.total_steps, values)

    def _count(self, agreed: Agreed, step: Step, seconds: float) -> None:
        state = self.state
        for name, count in agreed.tokens_by_source.items():
            state.tokens_by_source[name] = state.tokens_by_source.get(name, 0) + count
            state.tokens += count
        state.step += 1
        state.targets += step.targets
        state.training_seconds += seconds
        if step.skipped:
            state.skipped.append(state.step)
            log.warning("step %d: gradients are not finite; its update was skipped", state.step)

    # --- evaluation ---------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        """Whether to evaluate after the coming step: as asked, else when 3 % of the time allows it."""
        every = self.config.validation.every_steps
        if every is not None:
            return (self.state.step + 1) % every == 0
        spent, trained = self.state.evaluation_seconds, self.state.training_seconds
        # Twice what was spent: one more evaluation, and the one at the end.
        return spent > 0 and 2.0 * spent < TIME_SHARE * trained

    def evaluate(self, base: HeldOut | None) -> HeldOut:
        """Held-out losses now, written to metrics and progress, with the difference to `base`.

        Raises Stopped after a stop was asked; a later run then begins with this evaluation.
        """
        failpoints.hit("train.evaluate")
        self.reporter.phase("Evaluating")
        self.state.evaluation_pending = True
        began = time.monotonic()
        try:
            result = self.evaluator.run(self.model, self.stop_asked)
        except Interrupted:
            self._stop()
        self.state.evaluation_pending = False
        self.state.evaluation_seconds += time.monotonic() - began
        values = result.metrics()
        if base is not None:
            for role, loss in base.by_role.items():
                key = f"heldout_{role.lower()}_loss"
                if key in values:
                    values[f"{key}_change"] = values[key] - loss
        self.state.heldout = finite(values)
        if self.metrics is not None:
            self.metrics.write(step=self.state.step, evaluation=values)
        self.reporter.evaluation(values)
        return result

    # --- saving -------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        every = self.config.checkpoint.every_steps
        if self.state.step % every == 0 or self.state.step == self.total_steps:
            self.save()

    def save(self) -> Saved:
        self.reporter.phase("Saving")
        saved = self.checkpoints.save(self.state.step, self.tensors(), self.state.to_json())
        self.reporter.saved(saved)
        log.info("saved step %d in %.2f s (%.1f MB)", saved.step, saved.seconds, saved.bytes / 1e6)
        return saved

    def _stop(self) -> NoReturn:
        saved = self.save()
        raise Stopped(
            f"stopped after step {saved.step} of {self.total_steps}, which is saved in "
            f"{saved.path}; run the same command again to continue"
        )
