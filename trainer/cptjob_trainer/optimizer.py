"""AdamW over two groups: matrices decay, norms and biases do not."""

import torch
from torch import nn

from cptjob_trainer.config import Training
from cptjob_trainer.model import trainable


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay, arXiv 1711.05101) with the fused kernel.

    Decay is for parameters of two or more dimensions: shrinking a norm's scale or a bias changes
    what the model computes without regularising it.
    """
    settings = training.optimizer
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in trainable(model):
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=1.0,  # set anew before each step
        betas=tuple(settings.betas),  # type: ignore[arg-type]
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same rate for all groups; a plain number, so that nothing is compiled anew."""
    for group in optimizer.param_groups:
        group["lr"] = value


def initialise_state(optimizer: torch.optim.AdamW) -> None:
    """Give every parameter its (zero) moments before the first step, so that a checkpoint can fill them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
