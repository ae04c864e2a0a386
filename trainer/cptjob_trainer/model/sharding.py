"""A model shared between ranks (FSDP2), and how its weights get there: no rank but the first ever
holds all of them, and no device does.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cptjob_trainer.model.causal import LossModel, decoder_layers, plain_name
from cptjob_trainer.runtime import Runtime


def tensors(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have; what is tied has several."""
    named: dict[str, torch.Tensor] = {}
    named.update(lm.named_parameters(remove_duplicate=False))
    named.update(lm.named_buffers(remove_duplicate=False))
    return named


def shard(model: LossModel, runtime: Runtime) -> None:
    """One group a layer, the rest (embedding, norm, head) in the root's.

    Masters stay fp32; layers compute in the runtime's type; gradients are reduced in fp32 and summed,
    not averaged, because the loss is already divided by the targets of the whole global batch.
    """
    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    policy = MixedPrecisionPolicy(param_dtype=runtime.dtype, reduce_dtype=torch.float32)
    if runtime.dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    for layer in decoder_layers(model.lm):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums: gloo knows no scaled ones.
            module.set_force_sum_reduction_for_comms(True)


def fill(model: LossModel, values: dict[str, torch.Tensor], runtime: Runtime) -> None:
    """Give the sharded `model`, still on the meta device, what the first rank has. Collective.

    values: `tensors` of the whole model in the first rank, which are let go one by one; empty in the
    others.
    """
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            whole = _whole(parameter, values.pop(plain_name(name), None), runtime)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
        for name, buffer in model.named_buffers():
            whole = _whole(buffer, values.pop(plain_name(name), None), runtime)
            if runtime.world > 1 and whole.numel():
                # As bytes: not every backend knows every type.
                dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
            buffer.copy_(whole)


def _whole(like: torch.Tensor, value: torch.Tensor | None, runtime: Runtime) -> torch.Tensor:
    """The first rank's value on this rank's device; in other ranks, room for it."""
    if runtime.rank == 0:
        assert value is not None
        return value.detach().to(runtime.device).contiguous()
    return torch.empty(like.shape, dtype=like.dtype, device=runtime.device)
