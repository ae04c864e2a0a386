"""One rank: brings the parts of a run together, trains, and hands over the result.

Called by the launcher as `main(config_path)`; the environment is that of torch elastic, with
CPTJOB_PREPARED naming the prepared data and CPTJOB_STORE the coordinator's store.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

# Loaded before the fork, so that a restarted worker does not pay for them.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers

from cptjob_trainer import store
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.prepared import Prepared, load_prepared
from cptjob_trainer.model import presets
from cptjob_trainer.model.causal import plain_name
from cptjob_trainer.results import result
from cptjob_trainer.runtime import Runtime
from cptjob_trainer.training.components import Components, assemble
from cptjob_trainer.training.evaluate import HeldOut, load_base, save_base
from cptjob_trainer.training.loop import Trainer
from cptjob_trainer.training.metrics import MetricsLog
from cptjob_trainer.training.reporter import STORE_VARIABLE
from cptjob_trainer.training.stopflag import StopFlag

log = logging.getLogger(__name__)

PREPARED_VARIABLE = "CPTJOB_PREPARED"
#: Name of the node that this process runs on; without it, the machine's own.
NODE_VARIABLE = "CPTJOB_NODE"
#: How long the coordinator's store may take to answer before a warning goes to the log alone.
STORE_SECONDS = 5.0


def main(config_path: str) -> None:
    """Train one rank to the end. Raises CPTJobError for what can be foreseen."""
    stop = StopFlag()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _log_to_stderr(rank)
    config = presets.load(config_path)
    prepared = load_prepared(Path(os.environ[PREPARED_VARIABLE]))
    device = _device()
    _make_repeatable(config)
    with process_group(world, device):
        # Of every rank, so that each pod's log says which one it has.
        print(f"rank {rank} of {world} on {device}", file=sys.stderr, flush=True)
        _train(config, prepared, Runtime.of(config.training, rank, world, device), stop)


@contextmanager
def process_group(world: int, device: torch.device) -> Iterator[None]:
    """The group of all ranks, where there are others.

    It is destroyed only where all ranks come to the end. After an error the others may stand in a
    collective, and to destroy the group could wait for them; the end of this process wakes them.
    """
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    yield
    if world > 1:
        dist.destroy_process_group()


def _log_to_stderr(rank: int) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its fonts
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


def _train(config: TrainerConfig, prepared: Prepared, runtime: Runtime, stop: StopFlag) -> None:
    components = assemble(config, prepared, runtime)
    checkpoints, reporter = components.checkpoints, components.reporter
    node = os.environ.get(NODE_VARIABLE) or socket.gethostname()
    reporter.nodes(checkpoints.ranks.gather(node))
    resume = checkpoints.open()
    _warn(checkpoints.warnings, runtime)
    base, seconds = _base_losses(components, prepared)
    state = LoopState(evaluation_seconds=seconds)
    if resume is not None:
        checkpoints.load(resume, components.tensors())
        state = LoopState.from_json(resume.loop_state)
        reporter.resumed(resume)
        log.info("continuing after step %d from %s", resume.step, resume.path)
    metrics = _metrics_log(config, state) if runtime.rank == 0 else None
    trainer = Trainer(components, state, stop_asked=lambda: stop.asked, metrics=metrics)
    reporter.start(state.step, prepared.total_steps)
    stop.heed()
    trainer.run(base)
    components.batcher.close()
    _finish(config, prepared, trainer, base)
    reporter.phase("Complete")
    reporter.close()


def _warn(warnings: list[str], runtime: Runtime) -> None:
    """In the log, and once for all ranks to the person who watches the job."""
    for warning in warnings:
        log.warning("%s", warning)
    address = os.environ.get(STORE_VARIABLE, "")
    if warnings and address and runtime.rank == 0:
        with suppress(RuntimeError):  # a lost store costs the lines only
            client = store.connect(address, STORE_SECONDS)
            for warning in warnings:
                store.warn(client, warning)


def _metrics_log(config: TrainerConfig, state: LoopState) -> MetricsLog:
    paths, evaluated = config.paths, not state.evaluation_pending
    return MetricsLog(paths.output / "metrics.jsonl", state.step, paths.events, evaluated=evaluated)


def _base_losses(components: Components, prepared: Prepared) -> tuple[HeldOut, float]:
    """Held-out losses of the untouched model, measured once for this model and data.

    And the seconds that took: what an evaluation costs, by which later ones are rationed.
    """
    path = prepared.directory / "base-losses.json"
    known = load_base(path)
    # One rank may see a file that another does not see yet.
    if components.runtime.all(known is not None) and known is not None:
        return known
    components.reporter.phase("Evaluating", "the base model")
    began = time.monotonic()
    base = components.evaluator.run(components.model)
    seconds = time.monotonic() - began
    if components.runtime.rank == 0:
        save_base(path, base, seconds)
    return base, seconds


def _finish(config: TrainerConfig, prepared: Prepared, trainer: Trainer, base: HeldOut) -> None:
    """Write model, adapter, report and manifest, the manifest last. Collective."""
    runtime = trainer.runtime
    trainer.reporter.phase("Saving", "the model")
    if trainer.metrics is not None:
        trainer.metrics.close()
    named = trainer.model.named_parameters()
    weights = {plain_name(name): tensor.detach() for name, tensor in named}
    result.publish(config, prepared, weights, trainer.state, base, runtime.rank, runtime.world)
    if runtime.world > 1:
        dist.barrier()
