"""The transformers model that training begins from: attention, dropouts and adapters in place."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cptjob_trainer.config import ResolvedTraining, TrainerConfig
from cptjob_trainer.errors import ConfigError, DataError
from cptjob_trainer.model import attention, dropout, dropout_rates, isolation, model_fit
from cptjob_trainer.model.causal import decoder_layers


def load(config: TrainerConfig, packed: bool) -> Any:
    """The whole model in fp32 on the CPU, its attention chosen by trying it.

    Raises DataError for weights that are not those of the configuration or not finite, ConfigError
    for dropouts and adapters that have no place in it, and for weights with which packed rows do
    not work.
    """
    from transformers import AutoModelForCausalLM

    model_config, missing = _model_config(config)
    # Adapters begin with random numbers.
    torch.manual_seed(config.training.seed)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        config=model_config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        # Told by the report, with the file.
        ignore_mismatched_sizes=True,
    )
    lm, report = loaded
    model_fit.refuse(Path(config.model.path), lm.state_dict().keys(), report)
    _refuse_not_finite(lm, Path(config.model.path))
    _choose_attention(lm, packed, dropout_rates.active(lm, model_config))
    _adapt(lm, config.training, missing)
    return lm


def skeleton(config: TrainerConfig, attention_name: str, parameters: Iterable[str]) -> Any:
    """What `load` makes, on the meta device: all but the values.

    attention_name, parameters: the attention that `load` chose, and the names of its parameters.
    """
    from transformers import AutoModelForCausalLM

    model_config, missing = _model_config(config)
    attention.register()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        lm.set_attn_implementation(attention_name)
        _adapt(lm, config.training, missing)
    _untie(lm, parameters)
    return lm


def _model_config(config: TrainerConfig) -> tuple[Any, list[str]]:
    """The model's configuration with the manifest's dropouts, and those it has no name for."""
    model_config = model_fit.read_config(Path(config.model.path))
    dropout_rates.check_reproducible(model_config)
    return model_config, dropout_rates.set_rates(model_config, _rates(config.training))


def _rates(training: ResolvedTraining) -> dict[str, float | None]:
    return {
        "hidden": training.dropout.hidden,
        "attention": training.dropout.attention,
        "feed_forward": training.dropout.feed_forward,
    }


def _adapt(lm: Any, training: ResolvedTraining, missing: list[str]) -> None:
    """Adapters, and the dropouts that the architecture has no name for."""
    if training.method == "LoRA":
        _add_adapters(lm, training)
    # After the adapters, so that what is dropped is the sum of both branches.
    layers = decoder_layers(lm)
    dropout_rates.inject(layers, _rates(training), missing)
    dropout.mark_layers(layers)
    lm.config.use_cache = False


def _refuse_not_finite(lm: nn.Module, path: Path) -> None:
    for name, parameter in lm.named_parameters():
        # One pass over the memory; only a sum that is not finite is worth looking at each number.
        if torch.isfinite(parameter.sum()) or torch.isfinite(parameter).all():
            continue
        count = int((~torch.isfinite(parameter)).sum())
        raise DataError(
            f"{path}: {count:,} of the {parameter.numel():,} numbers of the tensor {name} are NaN or "
            "infinite; copy the model anew, or save it again from a sound one"
        )


def _choose_attention(lm: Any, packed: bool, dropping: bool) -> None:
    """The attention that keeps a row's documents apart; raises ConfigError when none does."""
    if packed and not isolation.settle(lm):
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
    linear = {n.rpartition(".")[2] for n, m in lm.named_modules() if isinstance(m, nn.Linear)}
    try:
        inject_adapter_in_model(peft_config, lm)
    except ValueError as error:
        reason = str(error).partition("\n")[0].partition(". Please")[0].rstrip(".")
        raise ConfigError(
            f"training.lora.targetModules: {', '.join(lora.target_modules)} cannot be used with this "
            f"model: {reason}; name some of its linear layers: {', '.join(sorted(linear))}"
        ) from error
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _untie(lm: Any, parameters: Iterable[str]) -> None:
    """Part what the configuration ties though the checkpoint holds two different tensors for it."""
    for name in set(parameters) - {name for name, _ in lm.named_parameters()}:
        owner, _, attribute = name.rpartition(".")
        tied = lm.get_parameter(name)
        own = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
        setattr(lm.get_submodule(owner), attribute, own)
