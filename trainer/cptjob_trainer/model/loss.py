"""Cross entropy of a linear head without ever holding all of its logits.

For a vocabulary of V and N tokens the logits are N x V numbers, and the usual path keeps several
copies of them: with V = 49,152 and N = 1,024 that is 200 MB each in fp32. Here the head and the loss
are one function which walks over the tokens in chunks and computes the gradients of a chunk right
after its logits, so nothing is computed twice (the idea is Liger Kernel's fused linear cross entropy,
arXiv 2410.10989; the code is plain PyTorch and runs on any device).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100

# Logits held at a time, (least, most) by device. On a CPU a chunk is best written and read while it
# is near the caches; a GPU wants products large enough to fill it.
CHUNK_ELEMENTS = {"cpu": (2**18, 2**25), "cuda": (2**27, 2**28)}
# Of these so many at a time in fp32, twice: on a CPU that fits its caches.
SOFTMAX_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def chunk_rows(vocabulary: int, width: int, device_type: str) -> int:
    """Tokens per chunk, a multiple of 64.

    A chunk costs one pass over the weight's gradient (V x d) beside its products (rows x V x d), so
    it has at least about d rows where the bound on its logits allows that.
    """
    least, most = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])
    rows = min(max(least // vocabulary, width), most // vocabulary)
    return max(64, rows // 64 * 64)


def softmax_gradient(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of logits [n, V], fp32, and its gradient softmax - onehot in their type.

    The softmax is fp32. What is ignored has neither loss nor gradient. Writes over the logits.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    most = SOFTMAX_ELEMENTS.get(logits.device.type, SOFTMAX_ELEMENTS["cuda"])
    rows = max(1, most // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        kept = (target != IGNORE).unsqueeze(1)
        safe = target.clamp_min(0).unsqueeze(1)
        exact = part.float()
        highest, chosen = exact.amax(1, keepdim=True), exact.gather(1, safe)
        grad = torch.softmax(exact, dim=1)
        # The largest probability is no less than 1 / V, so its logarithm is exact enough.
        losses = highest - grad.amax(1, keepdim=True).log() - chosen
        total += torch.where(kept, losses, 0.0).sum()
        grad.scatter_add_(1, safe, torch.full_like(highest, -1.0))
        part.copy_(grad.mul_(kept))
    return total, logits


def softmax_gradient_to_compile(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, written so that a compiler makes one pass of it, and with the logits left alone."""
    kept = (targets != IGNORE).unsqueeze(1)
    exact = logits.float()
    log_z = torch.logsumexp(exact, 1, keepdim=True)
    chosen = logits.gather(1, targets.clamp_min(0).unsqueeze(1)).float()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1)
    grad = torch.where(kept, (exact - log_z).exp() - is_target.float(), 0.0)
    return torch.where(kept, log_z - chosen, 0.0).sum(), grad.to(logits.dtype)


# Either of the two above.
SoftmaxGradient = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
        gradient: SoftmaxGradient,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks, so kept in fp32 whatever the compute type is.
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if needs_weight
            else None
        )
        grad_bias = None
        if bias is not None and needs_bias:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk, target = hidden[part], targets[part]
            loss, grad = gradient(F.linear(chunk, weight, bias), target)
            total += loss
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), chunk)
                else:
                    grad_weight += grad.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_type, bias_type = ctx.types
        # The gradients are this function's own and used once, so they are scaled in place. With a
        # dimension, the scale makes the product fp32 where a scalar would be rounded to bf16 first.
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.reshape(1)),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight_type),
            None if grad_bias is None else grad_bias.mul_(scale).to(bias_type),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    gradient: SoftmaxGradient = softmax_gradient,
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T + bias)[target], as an fp32 scalar.

    hidden [N, d]; weight [V, d]; bias [V] or None; targets [N] int64, IGNORE for no loss.
    gradient: `softmax_gradient`, or the other one compiled.
    Under autocast the products run in the autocast type; the softmax is always fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    compute = hidden.dtype
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(
            hidden,
            weight.to(compute),
            None if bias is None else bias.to(compute),
            targets,
            chunk_rows(weight.shape[0], weight.shape[1], device),
            gradient,
        )
    return loss


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same sum from ready logits [N, V]: for models whose own head does more than a product."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
