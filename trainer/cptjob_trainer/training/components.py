"""What a training process is made of, put together from its configuration and the prepared data."""

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from cptjob_trainer.checkpoint import lineage
from cptjob_trainer.checkpoint.checkpoints import Checkpoints
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data.batch import Batch, BatchShape
from cptjob_trainer.data.batcher import Batcher
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.devices import peak_flops
from cptjob_trainer.model import activations, compiling, pretrained, sharding
from cptjob_trainer.model.causal import LossModel
from cptjob_trainer.ranks import Ranks
from cptjob_trainer.runtime import Runtime
from cptjob_trainer.training.evaluate import Evaluator
from cptjob_trainer.training.optimizer import build_optimizer, checkpoint_tensors, initialise_state
from cptjob_trainer.training.reporter import Reporter

# One short row is enough to tell two losses apart, and costs a big model no time.
CHECKED_TOKENS = 128


@dataclass(frozen=True)
class Components:
    """The parts of one process, of which `Trainer` makes a run."""

    config: TrainerConfig
    runtime: Runtime
    model: LossModel
    optimizer: torch.optim.AdamW
    batcher: Batcher
    evaluator: Evaluator
    checkpoints: Checkpoints
    reporter: Reporter
    total_steps: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: trained parameters under their own names, and AdamW's moments."""
        return checkpoint_tensors(self.model, self.optimizer)


def assemble(config: TrainerConfig, prepared: Prepared, runtime: Runtime) -> Components:
    """Load the model and make everything around it. Collective. Raises ConfigError."""
    batcher = make_batcher(config, prepared, runtime)
    model = _model(config, prepared, runtime, batcher)
    evaluator = Evaluator(prepared.heldout, batcher.shape, runtime, _domain_rows(prepared))
    batcher.shape = replace(batcher.shape, dropping=model.dropping)
    reporter = _reporter(config, prepared, runtime, model)
    optimizer = build_optimizer(model, config.training)
    initialise_state(optimizer)
    return Components(
        config=config,
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        batcher=batcher,
        evaluator=evaluator,
        checkpoints=Checkpoints(
            config.paths.output / "checkpoints",
            uid=config.uid,
            lineage=lineage.lineage(config, prepared),
            inputs=lineage.inputs(config),
            keep_last=config.checkpoint.keep_last,
            on_mismatch=config.checkpoint.on_mismatch,
            rank=runtime.rank,
            world=runtime.world,
        ),
        reporter=reporter,
        total_steps=prepared.total_steps,
    )


def _domain_rows(prepared: Prepared) -> int:
    return sum(source.rows() for source in prepared.sources if source.role == "Domain")


def make_batcher(config: TrainerConfig, prepared: Prepared, runtime: Runtime) -> Batcher:
    """The rows of this process."""
    training = config.training
    # Few rows may be left for each rank; then its micro-batch is no larger than that.
    per_rank = -(-training.global_batch_size // runtime.world)
    shape = BatchShape(
        micro_batch=min(training.batch_size_per_device, per_rank),
        max_length=prepared.max_length,
        pad_id=prepared.pad_id,
        packed=prepared.packed,
    )
    return Batcher(
        prepared.sources,
        prepared.mix(training.seed),
        shape,
        global_batch=training.global_batch_size,
        rank=runtime.rank,
        world=runtime.world,
    )


def _reporter(
    config: TrainerConfig, prepared: Prepared, runtime: Runtime, model: LossModel
) -> Reporter:
    on_gpu = runtime.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(runtime.device) if on_gpu else "cpu")
    drawn = prepared.drawn(config.training.global_batch_size) / max(1, prepared.total_rows)
    reporter = Reporter(
        runtime.rank,
        model.flops_per_token(prepared.max_length),
        None if peak is None else peak * runtime.world,
        config.training.epochs * drawn,
    )
    reporter.phase("Loading", f"{model.parameter_count() / 1e6:.1f}M parameters")
    return reporter


# --- the model -------------------------------------------------------------------------------------


def _model(
    config: TrainerConfig, prepared: Prepared, runtime: Runtime, batcher: Batcher
) -> LossModel:
    """The model with its loss tried on real weights and rows, then wrapped, compiled and sharded."""
    sample = batcher.step(0).micro_batches[0].head(CHECKED_TOKENS)
    values: dict[str, torch.Tensor] = {}
    if runtime.sharded:
        # Only the first rank loads the weights, and only it tries them.
        ranks = Ranks(runtime.rank, runtime.world)
        found = ranks.once(lambda: _look_at_weights(config, prepared.packed, sample, values))
        gc.collect()
        lm = pretrained.skeleton(config, found["attention"], found["parameters"])
        model = LossModel(lm, fused=found["fused"])
    else:
        lm = pretrained.load(config, prepared.packed).to(runtime.device)
        model = LossModel(lm)
        _settle_loss(model, sample)
    activations.checkpoint_where_needed(model, config, runtime)
    rows = prepared.drawn(config.training.global_batch_size)
    tokens = rows * prepared.max_length / runtime.world
    flops = model.flops_per_token(prepared.max_length) * tokens
    compiling.compile_where_it_pays(model, config, runtime, flops)
    if runtime.sharded:
        sharding.shard(model, runtime)
        sharding.fill(model, values, runtime)
    return model


def _look_at_weights(
    config: TrainerConfig, packed: bool, sample: Batch, values: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Rank 0: load the whole model into `values`; what was found by trying it, as JSON."""
    model = LossModel(pretrained.load(config, packed))
    _settle_loss(model, sample)
    values.update(sharding.tensors(model.lm))
    return {
        "attention": model.lm.config._attn_implementation,
        "fused": model.fused,
        "parameters": [name for name, _ in model.lm.named_parameters()],
    }


def _settle_loss(model: LossModel, sample: Batch) -> None:
    device = next(model.parameters()).device
    model.settle_loss(sample.to(device, model.documents))
