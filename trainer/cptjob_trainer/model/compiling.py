"""torch.compile: where it pays, and what of the model."""

import logging
import shutil

import torch

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.model.causal import LossModel, decoder_layers
from cptjob_trainer.model.loss import softmax_gradient_to_compile
from cptjob_trainer.runtime import Runtime

log = logging.getLogger(__name__)

# Work above which compiling is sure to pay on a CPU, where it costs about a minute: some ten minutes.
LEAST_FLOPS_CPU = 1e14


def compile_where_it_pays(
    model: LossModel, config: TrainerConfig, runtime: Runtime, flops: float
) -> None:
    """Compile each layer (they are alike, so the code is made once for all of them) and the loss.

    flops: of the whole run on this process. Depends on the run alone, so that a restart decides the
    same.
    """
    if not _pays(model, config, runtime, flops):
        return
    for layer in decoder_layers(model.lm):
        layer.compile()
    model.gradient = torch.compile(softmax_gradient_to_compile)


def _pays(model: LossModel, config: TrainerConfig, runtime: Runtime, flops: float) -> bool:
    on_cpu = runtime.device.type == "cpu"
    if config.compile == "Never":
        return False
    if model.dropping:
        log.info("compile: off, because dropout masks are drawn row by row")
        return False
    if on_cpu and shutil.which("g++") is None:
        log.info("compile: off, because there is no C++ compiler (g++) on this machine")
        return False
    return config.compile == "Always" or not on_cpu or flops > LEAST_FLOPS_CPU
