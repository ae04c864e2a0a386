"""The dropouts of an architecture: the manifest's rates under its own names, and added where it has
none.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cptjob_trainer.errors import ConfigError

# What architectures call the three rates of the manifest in their configs.
NAMES = {
    "hidden": (
        "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "residual_dropout",
        "resid_dropout", "dropout",
    ),
    "attention": ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout"),
    "feed_forward": ("activation_dropout", "ffn_dropout", "mlp_dropout"),
}  # fmt: skip
# Layers left out at random, and noise on routers: drawn outside F.dropout.
UNKEYED = ("layerdrop", "decoder_layerdrop", "router_jitter_noise", "input_jitter_noise")
# Linear layers that end a block, and the one that ends the feed-forward block.
BLOCK_ENDS = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "dense_4h_to_h", "dense")
FEED_FORWARD_ENDS = ("down_proj", "fc2", "dense_4h_to_h")


def set_rates(config: Any, rates: dict[str, float | None]) -> list[str]:
    """Write the manifest's rates into a transformers config; returns the kinds it has no name for.

    rates: kind ("hidden", "attention", "feed_forward") -> rate in [0, 1), None = the model's own.
    """
    missing = []
    for kind, rate in rates.items():
        if rate is None:
            continue
        found = [
            name for name in NAMES[kind] if isinstance(getattr(config, name, None), float | int)
        ]
        for name in found:
            setattr(config, name, rate)
        if not found and rate > 0:
            missing.append(kind)
    return missing


def inject(
    layers: Sequence[torch.nn.Module], rates: dict[str, float | None], kinds: list[str]
) -> None:
    """Add dropout to layers whose architecture has none of that kind, as hooks on their linear layers.

    hidden: on what a block adds to the residual stream; feed_forward: on the feed-forward block's
    activations. Raises ConfigError naming the field where the layers cannot take it.
    """
    for kind in kinds:
        rate = rates[kind] or 0.0
        ends = BLOCK_ENDS if kind == "hidden" else FEED_FORWARD_ENDS
        found = 0
        for layer in layers if kind != "attention" else ():
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] not in ends:
                    continue
                found += 1
                if kind == "hidden":
                    module.register_forward_hook(_drop_output(rate))
                else:
                    module.register_forward_pre_hook(_drop_input(rate))
        if not found:
            field = {"feed_forward": "feedForward"}.get(kind, kind)
            raise ConfigError(
                f"training.dropout.{field}: this model's architecture has no place for it; "
                "leave the field out or set it to 0"
            )


def _drop_output(rate: float) -> Any:
    def hook(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    return hook


def _drop_input(rate: float) -> Any:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (F.dropout(args[0], rate, module.training), *args[1:])

    return hook


def check_reproducible(config: Any) -> None:
    """Refuse randomness that belongs to no row: it could not be drawn again after a restart."""
    for name in UNKEYED:
        rate = getattr(config, name, 0)
        if isinstance(rate, float | int) and rate > 0:
            raise ConfigError(
                f"model: its config.json sets {name} to {rate}, randomness that a restart cannot "
                f"repeat; set {name} to 0 there"
            )


def active(model: torch.nn.Module, config: Any) -> bool:
    """Whether training this model drops anything at all (then its forward pass runs uncompiled)."""
    rates = [getattr(config, name, 0) for names in NAMES.values() for name in names]
    modules = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    hooked = any(
        m._forward_pre_hooks or m._forward_hooks
        for name, m in model.named_modules()
        if name.rpartition(".")[2] in BLOCK_ENDS
    )
    return hooked or any(isinstance(r, float | int) and r > 0 for r in [*rates, *modules])
