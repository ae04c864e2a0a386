"""Cross entropy of a linear head without ever holding all of its logits.

For a vocabulary of V and N tokens the logits are N x V numbers, and the usual path keeps several
copies of them: with V = 49,152 and N = 1,024 that is 200 MB each in fp32. Here the head and the loss
are one function which walks over the tokens in chunks and computes the gradients of a chunk right
after its logits, so nothing is computed twice (the idea is Liger Kernel's fused linear cross entropy,
arXiv 2410.10989; the code is plain PyTorch and runs on any device).
"""

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100

# Logits held at a time, (least, most) by device. On a CPU a chunk is best written and read while it
# is near the caches; a GPU wants products large enough to fill it.
CHUNK_ELEMENTS = {"cpu": (2**18, 2**24), "cuda": (2**27, 2**28)}


def chunk_rows(vocabulary: int, width: int, device_type: str) -> int:
    """Tokens per chunk, a multiple of 64.

    A chunk costs one pass over the weight's gradient (V x d) beside its products (rows x V x d), so
    it has at least about d rows where the bound on its logits allows that.
    """
    least, most = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])
    rows = min(max(least // vocabulary, width), most // vocabulary)
    return max(64, rows // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
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
            logits = F.linear(chunk, weight, bias).float()
            kept = target != IGNORE
            safe = target.clamp_min(0).unsqueeze(1)
            highest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, safe)
            grad = torch.softmax(logits, dim=1)
            del logits  # as large as all else here together
            # The largest probability is no less than 1 / V, so its logarithm is exact enough.
            nll = (highest - grad.amax(1, keepdim=True).log() - chosen).squeeze(1)
            total += torch.where(kept, nll, 0.0).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # d nll / d logits = softmax - onehot, and nothing for ignored targets.
            grad.scatter_add_(1, safe, torch.full_like(highest, -1.0))
            grad.mul_(kept.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
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
        # The gradients are this function's own and used once, so they are scaled in place.
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight_type),
            None if grad_bias is None else grad_bias.mul_(scale).to(bias_type),
            None,
            None,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T + bias)[target], as an fp32 scalar.

    hidden [N, d]; weight [V, d]; bias [V] or None; targets [N] int64, IGNORE for no loss.
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
        )
    return loss


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same sum from ready logits [N, V]: for models whose own head does more than a product."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
