"""One rank: brings the parts of a run together, trains, and hands over the result.

Called by the launcher as `main(config_path)`; the environment is that of torch elastic, with
CPTJOB_PREPARED naming the prepared data and CPTJOB_STORE the coordinator's store.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# Loaded before the fork, so that a restarted worker does not pay for them.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers

from cptjob_trainer import attention, dropout, evaluate, presets, result
from cptjob_trainer import model as models
from cptjob_trainer.checkpoints import Checkpoints
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import Batcher, to_device
from cptjob_trainer.devices import flops_per_token, peak_flops
from cptjob_trainer.errors import Stopped
from cptjob_trainer.loop import Runtime, Trainer, checkpoint_tensors
from cptjob_trainer.metrics import MetricsLog
from cptjob_trainer.model import LossModel
from cptjob_trainer.optimizer import build_optimizer, initialise_state
from cptjob_trainer.prepared import Prepared, load_prepared
from cptjob_trainer.reporter import Reporter
from cptjob_trainer.state import LoopState

log = logging.getLogger(__name__)

PREPARED_VARIABLE = "CPTJOB_PREPARED"
CHECKED_TOKENS = 128


class StopFlag:
    """Set by SIGTERM or SIGINT. The loop looks at it; before there is a loop it ends the process."""

    def __init__(self) -> None:
        self.asked = False
        self._heeded = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def heed(self) -> None:
        """From now on somebody looks at `asked`."""
        self._heeded = True
        if self.asked:
            self._end()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if not self._heeded:
            self._end()

    @staticmethod
    def _end() -> NoReturn:
        raise Stopped("stopped before a step was trained; the same command goes on from there")


def main(config_path: str) -> None:
    """Train one rank to the end. Raises CPTJobError for what can be foreseen."""
    stop = StopFlag()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _log_to_stderr(rank)
    config = presets.load(config_path)
    prepared = load_prepared(Path(os.environ[PREPARED_VARIABLE]))
    device = _device()
    _make_repeatable(config)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        _train(config, prepared, rank, world, device, stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _log_to_stderr(rank: int) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
    )
    transformers.utils.logging.disable_progress_bar()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _make_repeatable(config: TrainerConfig) -> None:
    torch.manual_seed(config.training.seed)
    # TF32 for what stays fp32 on a GPU, unless the same bits are wanted.
    torch.set_float32_matmul_precision("highest" if config.training.deterministic else "high")
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _train(
    config: TrainerConfig,
    prepared: Prepared,
    rank: int,
    world: int,
    device: torch.device,
    stop: StopFlag,
) -> None:
    training = config.training
    dtype = models.compute_dtype(training, device)
    lm = models.load(config, prepared.packed)
    parameters = sum(p.numel() for p in lm.parameters())
    flops = flops_per_token(
        parameters,
        len(models.decoder_layers(lm)),
        int(getattr(lm.config, "hidden_size", 0)),
        prepared.max_length,
        frozen=training.method == "LoRA",
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    reporter = Reporter(rank, flops, _peak(name, world), float(training.epochs))
    reporter.phase("Loading", f"{parameters / 1e6:.1f}M parameters")
    # Few rows may be left for each rank; then its micro-batch is no larger than that.
    per_rank = -(-training.global_batch_size // world)
    micro_batch = min(training.batch_size_per_device, per_rank)

    runtime = Runtime(
        rank=rank,
        world=world,
        device=device,
        dtype=dtype,
        sharded=world > 1,
        documents=lm.config._attn_implementation == attention.NAME,
        dropping=dropout.active(lm, lm.config),
    )
    batcher = Batcher(
        prepared.sources,
        prepared.mix(training.seed),
        global_batch=training.global_batch_size,
        micro_batch=micro_batch,
        max_length=prepared.max_length,
        pad_id=prepared.pad_id,
        packed=prepared.packed,
        rank=rank,
        world=world,
    )
    run_flops = flops * prepared.total_rows * prepared.max_length / world
    model = _build(config, lm, runtime, batcher, run_flops)
    optimizer = build_optimizer(model, training)
    initialise_state(optimizer)
    evaluator = evaluate.Evaluator(
        prepared.heldout,
        total_rows=prepared.total_rows,
        micro_batch=micro_batch,
        max_length=prepared.max_length,
        pad_id=prepared.pad_id,
        packed=prepared.packed,
        documents=runtime.documents,
        rank=rank,
        world=world,
        device=device,
        dtype=dtype,
        sharded=runtime.sharded,
    )
    checkpoints = Checkpoints(
        config.paths.output / "checkpoints",
        uid=config.uid,
        lineage=result.lineage(config, prepared),
        keep_last=config.checkpoint.keep_last,
        on_mismatch=config.checkpoint.on_mismatch,
        rank=rank,
        world=world,
    )
    resume = checkpoints.open()
    for warning in checkpoints.warnings:
        log.warning("%s", warning)
    state = LoopState()
    base, evaluation_seconds = _base_losses(evaluator, model, prepared, rank, world, reporter)
    state.evaluation_seconds = evaluation_seconds
    if resume is not None:
        checkpoints.load(resume, checkpoint_tensors(model, optimizer))
        state = LoopState.from_json(resume.loop_state)
        log.info("continuing after step %d from %s", resume.step, resume.path)
    trainer = Trainer(
        config,
        runtime,
        model,
        optimizer,
        batcher,
        evaluator,
        checkpoints,
        state,
        prepared.total_steps,
        [source.name for source in prepared.sources],
        stop_asked=lambda: stop.asked,
        metrics=_metrics_log(config, state.step) if rank == 0 else None,
        reporter=reporter,
    )
    reporter.start(state.step, prepared.total_steps)
    stop.heed()
    trainer.run(base)
    batcher.close()
    _finish(config, prepared, trainer, base)
    reporter.phase("Complete")
    reporter.close()


def _metrics_log(config: TrainerConfig, step: int) -> MetricsLog:
    out = config.paths.output
    events = out / "tensorboard" if config.tracking.tensor_board else None
    return MetricsLog(out / "metrics.jsonl", step, events)


def _peak(device_name: str, world: int) -> float | None:
    peak = peak_flops(device_name)
    return None if peak is None else peak * world


def _build(
    config: TrainerConfig,
    lm: Any,
    runtime: Runtime,
    batcher: Batcher,
    run_flops: float,
) -> LossModel:
    """Check the loss on real weights and rows, then wrap, shard and compile it."""
    model = LossModel(lm)
    lm.to(runtime.device)
    _check_loss(model, runtime, batcher)
    setting = config.training.activation_checkpointing
    if setting == "Full" or (
        setting == "Auto"
        and models.needs_checkpointing(model, config, runtime.device, runtime.world)
    ):
        models.set_activation_checkpointing(lm)
    if models.compiles(config, runtime.device, run_flops, runtime.dropping):
        models.compile_layers(model)
    if runtime.sharded:
        models.shard(model, runtime.device, runtime.dtype, runtime.world)
    return model


def _check_loss(model: LossModel, runtime: Runtime, batcher: Batcher) -> None:
    # One short row is enough to tell two losses apart, and costs a big model no time.
    first = batcher.step(0).micro_batches[0].head(CHECKED_TOKENS)
    models.check_loss(model, to_device(first, runtime.device, runtime.documents))
    if runtime.world > 1:
        # Each rank looked at rows of its own; all must go the same way.
        verdict = torch.tensor([int(model.fused)], device=runtime.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        model.fused = bool(verdict.item())


def _base_losses(
    evaluator: evaluate.Evaluator,
    model: LossModel,
    prepared: Prepared,
    rank: int,
    world: int,
    reporter: Reporter,
) -> tuple[evaluate.HeldOut, float]:
    """Held-out losses of the untouched model, measured once for this model and data.

    And the seconds that took: what an evaluation costs, by which later ones are rationed.
    """
    path = prepared.directory / "base-losses.json"
    known = evaluate.load_base(path)
    if world > 1:
        # One rank may see a file that another does not see yet.
        have = torch.tensor([int(known is not None)], device=evaluator.device)
        dist.all_reduce(have, op=dist.ReduceOp.MIN)
        known = known if have.item() else None
    if known is not None:
        return known
    reporter.phase("Evaluating", "the base model")
    began = time.monotonic()
    base = evaluator.run(model)
    seconds = time.monotonic() - began
    if rank == 0:
        evaluate.save_base(path, base, seconds)
    return base, seconds


def _finish(
    config: TrainerConfig, prepared: Prepared, trainer: Trainer, base: evaluate.HeldOut
) -> None:
    """Write model, adapter, report and manifest, the manifest last. Collective."""
    runtime = trainer.runtime
    trainer.reporter.phase("Saving", "the model")
    if trainer.metrics is not None:
        trainer.metrics.close()
    named = trainer.model.named_parameters()
    weights = {models.plain_name(name): tensor.detach() for name, tensor in named}
    result.publish(config, prepared, weights, trainer.state, base, runtime.rank, runtime.world)
    if runtime.world > 1:
        dist.barrier()
