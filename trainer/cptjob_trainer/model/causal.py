"""A causal LM that gives its loss.

`LossModel` is the one module the loop calls and the FSDP root. The loss is computed inside its
forward, for only there are the head's weights (often tied to the embedding, both in the root's
group) gathered.
"""

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cptjob_trainer import devices
from cptjob_trainer.model import attention, dropout_rates
from cptjob_trainer.model.loss import (
    SoftmaxGradient,
    cross_entropy,
    linear_cross_entropy,
    softmax_gradient,
)

if TYPE_CHECKING:
    from cptjob_trainer.data.batch import Batch

log = logging.getLogger(__name__)

# Config fields of architectures that scale or cap their logits. `settle_loss` finds those that are
# not listed; the list is for caps that do nothing yet at the first step.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Relative difference of our loss and the model's own that rounding can explain.
LOSS_TOLERANCE = 1e-3


class LossModel(nn.Module):
    """A transformers causal LM with the loss in its forward.

    `fused` computes head and loss together, in chunks; the other way takes the model's own logits.
    """

    def __init__(self, lm: Any, fused: bool = True) -> None:
        super().__init__()
        self.lm: Any = lm
        self.fused = fused and can_fuse(lm)
        self.takes_positions = attention.accepts_positions(lm)
        self.body: Any = lm.base_model
        self.gradient: SoftmaxGradient = softmax_gradient
        # Whether batches must carry document borders, for `packed_attention`.
        self.documents = bool(lm.config._attn_implementation == attention.NAME)
        # Whether anything is dropped in training, so that dropout masks must be keyed.
        self.dropping = dropout_rates.active(lm, lm.config)
        lm.get_input_embeddings().register_forward_hook(_to_autocast_type)

    def forward(self, batch: "Batch") -> torch.Tensor:
        """Sum of the losses of the batch's targets, fp32 scalar."""
        arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False, **batch.documents}
        if self.takes_positions:
            arguments["position_ids"] = batch.positions
        targets = batch.targets.flatten()
        if self.fused:
            hidden = self.body(**arguments).last_hidden_state.flatten(0, 1)
            head = self.lm.get_output_embeddings()
            return linear_cross_entropy(hidden, head.weight, head.bias, targets, self.gradient)
        return cross_entropy(self.lm(**arguments).logits.flatten(0, 1), targets)

    def parameter_count(self) -> int:
        """Numbers in all parameters of all ranks, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs of a token in rows of `length`."""
        return devices.flops_per_token(
            self.parameter_count(),
            len(decoder_layers(self.lm)),
            int(getattr(self.lm.config, "hidden_size", 0)),
            length,
            frozen=not all(parameter.requires_grad for parameter in self.parameters()),
        )

    def settle_loss(self, batch: "Batch") -> None:
        """Compare the fused loss with that of the model's own logits; keep the latter on a mismatch.

        Architectures scale or cap their logits in ways no list would keep up with.
        """
        if not self.fused:
            return
        was_training = self.training
        self.eval()
        with torch.no_grad():
            ours = float(self(batch))
            self.fused = False
            own = float(self(batch))
        self.train(was_training)
        self.fused = abs(ours - own) <= LOSS_TOLERANCE * max(1.0, abs(own))
        if not self.fused:
            log.warning(
                "loss: the model's own (%.5g) differs from the plain one (%.5g): "
                "using the model's own",
                own,
                ours,
            )


def _to_autocast_type(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    """Autocast leaves the stream between the layers in fp32; FSDP's policy, and we, have it in bf16."""
    device = output.device.type
    if not torch.is_autocast_enabled(device):
        return output
    return output.to(torch.get_autocast_dtype(device))


def can_fuse(lm: Any) -> bool:
    """Whether the logits are a plain linear layer of the body's last hidden state."""
    scaled = any(getattr(lm.config, name, None) not in (None, 1, 1.0) for name in LOGIT_CHANGES)
    plain = type(lm.get_output_embeddings()) is nn.Linear and lm.base_model is not lm
    return plain and not scaled


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in order: units of sharding, checkpointing, compiling and dropout."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        return []
    depth = int(getattr(lm.config, "num_hidden_layers", 0))
    best = next((m for m in lists if len(m) == depth), max(lists, key=len))
    return list(best)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that get gradients, by the name they have in the transformers model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """A parameter's name without what wrapping, compiling and checkpointing put into it."""
    name = re.sub(r"(_orig_mod|_checkpoint_wrapped_module)\.", "", name)
    return name.removeprefix("lm.")
