"""Activations: whether they fit, and recomputing them in the backward pass where they do not."""

import contextlib
import logging
import os
from pathlib import Path

import torch
from torch import nn

from cptjob_trainer import devices
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.model.causal import LossModel, decoder_layers
from cptjob_trainer.runtime import Runtime

log = logging.getLogger(__name__)


def checkpoint_where_needed(model: LossModel, config: TrainerConfig, runtime: Runtime) -> None:
    """Activation checkpointing, where the manifest wants it or leaves it open and memory is short.

    Collective: ranks of two minds would ask for each other's weights at different moments.
    """
    setting = config.training.activation_checkpointing
    asked = demand(model, config, runtime)
    if runtime.any(asked.recomputed(setting, _memory(config, runtime.device))):
        if setting == "Auto":
            whole = asked.memory(recomputed=False).total
            log.info("activation checkpointing: on, %.1f GB would not fit", whole / 1e9)
        _wrap_layers(model.lm)


def demand(model: LossModel, config: TrainerConfig, runtime: Runtime) -> devices.Demand:
    """What the job asks of each rank's device."""
    training = config.training
    return devices.Demand(
        parameters=model.parameter_count(),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=len(decoder_layers(model.lm)),
        width=int(getattr(model.lm.config, "hidden_size", 0)),
        vocabulary=int(getattr(model.lm.config, "vocab_size", 0)),
        tokens=training.batch_size_per_device * training.max_length,
        item=runtime.dtype.itemsize,
        devices=runtime.world,
    )


def _memory(config: TrainerConfig, device: torch.device) -> float:
    """Bytes for this process."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return host_memory() / config.processes.num_proc_per_node


def host_memory() -> int:
    """Bytes of memory this machine's processes may use: its own, or its container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(machine, int(Path("/sys/fs/cgroup", name).read_text()))
    return machine


def _wrap_layers(lm: nn.Module) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass.

    transformers' own switch recomputes below the layer's hooks, which would draw other dropout masks.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = decoder_layers(lm)
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) and module[0] is layers[0]:
            for at, layer in enumerate(module):
                module[at] = checkpoint_wrapper(layer, preserve_rng_state=False)
