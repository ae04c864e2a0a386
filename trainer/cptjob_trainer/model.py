"""The model as it is trained: loaded, adapted, sharded, compiled, and giving a loss.

`LossModel` is the one module the loop calls and the FSDP root. The loss is computed inside its
forward, for only there are the head's weights (often tied to the embedding, both in the root's
group) gathered.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cptjob_trainer import attention, dropout
from cptjob_trainer.config import ResolvedTraining, TrainerConfig, Training
from cptjob_trainer.errors import ConfigError
from cptjob_trainer.loss import (
    SoftmaxGradient,
    cross_entropy,
    linear_cross_entropy,
    softmax_gradient,
    softmax_gradient_to_compile,
)

log = logging.getLogger(__name__)

# Config fields of architectures that scale or cap their logits. `check_loss` finds those that are
# not listed; the list is for caps that do nothing yet at the first step.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Relative difference of our loss and the model's own that rounding can explain.
LOSS_TOLERANCE = 1e-3
# Work above which compiling is sure to pay on a CPU, where it costs about a minute: some ten minutes.
COMPILE_FLOPS_CPU = 1e14


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device. ids, positions, targets: int64 [rows, length]."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    # Keyword arguments naming the documents' borders; empty when rows hold one piece each.
    documents: dict[str, Any]


class LossModel(nn.Module):
    """A transformers causal LM with the loss in its forward.

    `fused` computes head and loss together, in chunks; the other way takes the model's own logits.
    """

    def __init__(self, lm: nn.Module, fused: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.fused = fused and can_fuse(lm)
        self.takes_positions = attention.accepts_positions(lm)
        self.body: Any = lm.base_model
        self.gradient: SoftmaxGradient = softmax_gradient
        embeddings: Any = lm.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(_to_autocast_type)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the losses of the batch's targets, fp32 scalar."""
        arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False, **batch.documents}
        if self.takes_positions:
            arguments["position_ids"] = batch.positions
        targets = batch.targets.flatten()
        if self.fused:
            hidden = self.body(**arguments).last_hidden_state.flatten(0, 1)
            head: Any = self.lm.get_output_embeddings()  # type: ignore[operator]
            return linear_cross_entropy(hidden, head.weight, head.bias, targets, self.gradient)
        return cross_entropy(self.lm(**arguments).logits.flatten(0, 1), targets)


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
    """The repeated blocks, in order: units of sharding, checkpointing and dropout."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        return []
    depth = int(getattr(lm.config, "num_hidden_layers", 0))
    best = next((m for m in lists if len(m) == depth), max(lists, key=len))
    return list(best)


def compute_dtype(training: Training, device: torch.device) -> torch.dtype:
    """Auto: bf16 on a GPU; fp32 on a CPU, where runs are then repeatable bit for bit."""
    if training.precision == "Auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if training.precision == "BFloat16" else torch.float32


def load(config: TrainerConfig, packed: bool) -> Any:
    """The transformers model in fp32 on the CPU, with dropouts set and adapters injected."""
    from transformers import AutoConfig, AutoModelForCausalLM

    training = config.training
    path = Path(config.model.path)
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    rates = {
        "hidden": training.dropout.hidden,
        "attention": training.dropout.attention,
        "feed_forward": training.dropout.feed_forward,
    }
    dropout.check_reproducible(model_config)
    missing = dropout.set_rates(model_config, rates)
    torch.manual_seed(training.seed)
    lm = AutoModelForCausalLM.from_pretrained(
        path,
        config=model_config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
    )
    _choose_attention(lm, packed, dropout.active(lm, model_config))
    if training.method == "LoRA":
        _add_adapters(lm, training)
    # After the adapters, so that what is dropped is the sum of both branches.
    layers = decoder_layers(lm)
    dropout.inject(layers, rates, missing)
    dropout.mark_layers(layers)
    lm.config.use_cache = False
    return lm


def _choose_attention(lm: Any, packed: bool, dropping: bool) -> None:
    """The attention that keeps a row's documents apart; raises ConfigError when none does."""
    if packed and not attention.settle(lm):
        raise ConfigError(
            "model: with these weights two documents in one row change each other's logits, though "
            "the architecture keeps them apart with random ones; it cannot be trained packed: "
            "please report it"
        )
    if dropping and lm.config._attn_implementation != attention.NAME:
        # Only here does the dropout of scores go through F.dropout and so belong to rows.
        lm.set_attn_implementation("eager")


def _add_adapters(lm: Any, training: ResolvedTraining) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = training.lora
    assert lora is not None, "a resolved LoRA job has its settings"
    targets: Any = list(lora.target_modules)
    peft_config = LoraConfig(
        r=lora.rank,
        # PEFT wants a whole number by its type only.
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets if targets != ["all-linear"] else "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(peft_config, lm)
    except ValueError as error:
        names = sorted(
            {n.rpartition(".")[2] for n, m in lm.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ConfigError(
            f"training.lora.targetModules: {lora.target_modules} fits no layer of this model; "
            f"its linear layers are {names}"
        ) from error
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that get gradients, by the name they have in the transformers model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """A parameter's name without what wrapping, compiling and checkpointing put into it."""
    name = re.sub(r"(_orig_mod|_checkpoint_wrapped_module)\.", "", name)
    return name.removeprefix("lm.")


def check_loss(model: LossModel, batch: Batch) -> None:
    """Compare the chunked loss with the one from the model's own logits; keep the latter on a mismatch.

    Architectures scale or cap their logits in ways no list would keep up with.
    """
    if not model.fused:
        return
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ours = float(model(batch))
        model.fused = False
        own = float(model(batch))
    model.train(was_training)
    model.fused = abs(ours - own) <= LOSS_TOLERANCE * max(1.0, abs(own))
    if not model.fused:
        log.warning(
            "loss: the model's own (%.5g) differs from the plain one (%.5g): using the model's own",
            own,
            ours,
        )


def needs_checkpointing(
    model: LossModel, config: TrainerConfig, device: torch.device, world: int
) -> bool:
    """Whether weights, their gradients and moments, and all activations would not fit in memory.

    Activations by arXiv 2205.05198, equation 2 without attention scores, which are never stored:
    34 bytes a token, layer and unit of width in half precision, twice that in fp32.
    """
    training = config.training
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    states = (16 * trained + 4 * frozen) / world
    tokens = training.batch_size_per_device * training.max_length
    width = int(getattr(model.lm.config, "hidden_size", 0))
    half = compute_dtype(training, device) != torch.float32
    activations = (34 if half else 68) * tokens * width * len(decoder_layers(model.lm))
    if device.type == "cuda":
        memory: float = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory() / config.processes.num_proc_per_node
    # A tenth is left to logits, buffers and fragmentation.
    needed = states + activations > 0.9 * memory
    if needed:
        log.info(
            "activation checkpointing: on, %.1f GB would not fit", (states + activations) / 1e9
        )
    return needed


def host_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(machine, int(Path("/sys/fs/cgroup", name).read_text()))
    return machine


def set_activation_checkpointing(lm: nn.Module) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass.

    transformers' own switch recomputes below the layer's hooks, which would draw other dropout masks.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = decoder_layers(lm)
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) and module[0] is layers[0]:
            for at, layer in enumerate(module):
                module[at] = checkpoint_wrapper(layer, preserve_rng_state=False)


def shard(model: LossModel, device: torch.device, dtype: torch.dtype, world: int) -> None:
    """FSDP2 over all ranks: one group a layer, the rest (embedding, norm, head) in the root's.

    Masters stay fp32; layers compute in `dtype`; gradients are reduced in fp32 and summed, not
    averaged, because the loss is already divided by the targets of the whole global batch.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    for layer in decoder_layers(model.lm):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums: gloo knows no scaled ones.
            module.set_force_sum_reduction_for_comms(True)


def compiles(config: TrainerConfig, device: torch.device, flops: float, dropping: bool) -> bool:
    """Whether to compile: a function of the run alone, so that a restart decides the same.

    flops: of the whole run on this process.
    """
    if config.compile == "Never":
        return False
    if dropping:
        log.info("compile: off, because dropout masks are drawn row by row")
        return False
    if device.type == "cpu" and shutil.which("g++") is None:
        log.info("compile: off, because there is no C++ compiler (g++) on this machine")
        return False
    if config.compile == "Always":
        return True
    return device.type == "cuda" or flops > COMPILE_FLOPS_CPU


def compile_layers(model: LossModel) -> None:
    """Compile each layer (they are alike, so the code is made once for all of them) and the loss."""
    for layer in decoder_layers(model.lm):
        layer.compile()
    model.gradient = torch.compile(softmax_gradient_to_compile)


def autocast(device: torch.device, dtype: torch.dtype, sharded: bool) -> Any:
    """The context of a forward pass; with FSDP its policy casts instead."""
    if sharded or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
