"""Activations: whether they fit, and recomputing them in the backward pass where they do not."""

import contextlib
import logging
import os
from pathlib import Path

import torch
from torch import nn

from cptjob_trainer import devices
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.model import LossModel, decoder_layers
from cptjob_trainer.runtime import Runtime

log = logging.getLogger(__name__)


def checkpoint_where_needed(model: LossModel, config: TrainerConfig, runtime: Runtime) -> None:
    """Activation checkpointing, where the manifest wants it or leaves it open and memory is short."""
    setting = config.training.activation_checkpointing
    if setting == "Full" or (setting == "Auto" and _is_needed(model, config, runtime)):
        _wrap_layers(model.lm)


def _is_needed(model: LossModel, config: TrainerConfig, runtime: Runtime) -> bool:
    """Whether all activations beside weights, gradients and moments would not fit in some rank.

    Collective: ranks of two minds would ask for each other's weights at different moments.
    """
    training = config.training
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = devices.state_bytes(model.parameter_count(), trained).total / runtime.world
    activations = devices.activation_bytes(
        training.batch_size_per_device * training.max_length,
        int(getattr(model.lm.config, "hidden_size", 0)),
        len(decoder_layers(model.lm)),
        runtime.dtype.itemsize,
        recomputed=False,
    )
    whole = states + activations
    needed = runtime.any(whole > devices.USABLE * _memory(config, runtime.device))
    if needed:
        log.info("activation checkpointing: on, %.1f GB would not fit", whole / 1e9)
    return needed


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
