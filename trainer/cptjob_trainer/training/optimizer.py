"""AdamW over two groups, matrices which decay and norms and biases which do not; what is saved of it."""

from collections.abc import Sequence

import torch
from torch import nn

from cptjob_trainer.config import Training
from cptjob_trainer.model.causal import trainable


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


def checkpoint_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Name -> tensor (or DTensor) of all that must be saved besides the loop's state."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainable(model):
        state = optimizer.state[parameter]
        if not state:
            raise RuntimeError(f"{name} is not the parameter that the optimizer knows")
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a total 2-norm of `max_norm` (0: never) and return the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: torch.Tensor = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
