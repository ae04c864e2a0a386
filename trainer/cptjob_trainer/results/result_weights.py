"""The weights of a result: those that were trained, in the base's names, dtypes and layout.

Adapters are merged into the weights that they change, in fp32. With DTensors the making of each is
collective: every rank makes them in the same order.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cptjob_trainer.errors import OutputError
from cptjob_trainer.model.safetensors_file import TORCH_DTYPES, Entry, opened, read_header


@dataclass(frozen=True)
class Weight:
    """A tensor of the output: what it will be, and what makes it (collective with DTensors)."""

    entry: Entry
    value: Callable[[], torch.Tensor]


def plan(base: Path, state: Mapping[str, torch.Tensor], lora_scale: float | None) -> list[Weight]:
    """Every tensor of the output, in the base's names, dtypes and layout, in the order of names."""
    skeleton = _skeleton(base)
    values = _merged(skeleton, state, lora_scale)
    for name, source in getattr(skeleton, "all_tied_weights_keys", {}).items():
        if source in values:
            values.pop(name, None)
    values.update(_untrained(skeleton, base, values.keys()))
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    unknown = values.keys() - shapes.keys()
    if unknown:
        raise OutputError(f"{base} describes no parameter {', '.join(sorted(unknown)[:5])}")
    dtype_of = _base_dtypes(base)
    planned = []
    for name, (shape, value) in _in_base_form(skeleton, shapes, values).items():
        entry = Entry(name, dtype_of(name), shape)
        planned.append(Weight(entry, _cast(value, entry.dtype)))
    return sorted(planned, key=lambda weight: weight.entry.name)


def _cast(value: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: value().to(dtype)


def _skeleton(base: Path) -> Any:
    """The model without its weights: names, ties and layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _merged(
    skeleton: Any, state: Mapping[str, torch.Tensor], scale: float | None
) -> dict[str, Callable[[], torch.Tensor]]:
    """A maker for each parameter, with LoRA's pairs merged into theirs."""
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    adapted = {name.partition(".lora_")[0] for name in state if ".lora_" in name}
    bare = sorted(module for module in adapted if f"{module}.base_layer.weight" not in state)
    if bare and not any(f"{module}.weight" in state for module in adapted):
        raise OutputError(f"adapters without the weights they change: {', '.join(bare[:5])}")
    for name in sorted(state):
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        module = plain.removesuffix(".weight")
        pair = [f"{module}.lora_{letter}.default.weight" for letter in "AB"]
        if plain.endswith(".weight") and pair[0] in state:
            if scale is None:
                raise OutputError(f"{module} has an adapter, but no lora_scale was given")
            flipped = type(skeleton.get_submodule(module)).__name__ == "Conv1D"
            makers[plain] = _sum(state, name, pair, scale, flipped)
        else:
            makers[plain] = _get(state, name)
    return makers


def _get(state: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: whole(state[name])


def _sum(
    state: Mapping[str, torch.Tensor], name: str, pair: list[str], scale: float, flipped: bool
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        weight, a, b = (whole(state[key]).float() for key in (name, *pair))
        change = (b @ a) * scale
        return weight + (change.T if flipped else change)

    return make


def whole(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU; collective for a DTensor."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def _untrained(skeleton: Any, base: Path, have: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """What the model saves and nobody trained (buffers), taken from the base."""
    ties = getattr(skeleton, "all_tied_weights_keys", {})
    missing = skeleton.state_dict().keys() - have - ties.keys()
    if not missing:
        return {}
    places = {name: path for path in _weight_files(base) for name in _header(path)}
    lost = sorted(missing - places.keys())
    if lost:
        raise OutputError(f"the trained state lacks {', '.join(lost[:5])}")
    return {name: _read_one(places[name], name) for name in missing}


def _read_one(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        with opened(path) as file:
            value: torch.Tensor = file.get_tensor(name)
            return value

    return make


def _in_base_form(
    skeleton: Any,
    shapes: dict[str, torch.Size],
    values: dict[str, Callable[[], torch.Tensor]],
) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Undo what transformers renames, splits or joins when it loads the base (experts, mostly).

    Tried first on tensors without values: where it only renames, tensors stay apart and are made
    one by one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = {name: torch.empty(shapes[name], device="meta") for name in sorted(values)}
    names = {id(tensor): name for name, tensor in empty.items()}
    reverted = revert_weight_conversion(skeleton, dict(empty))
    if all(id(tensor) in names for tensor in reverted.values()):
        return {
            new: (tuple(tensor.shape), values[names[id(tensor)]])
            for new, tensor in reverted.items()
        }
    joined = revert_weight_conversion(skeleton, {name: values[name]() for name in sorted(values)})
    return {name: (tuple(tensor.shape), _held(tensor)) for name, tensor in joined.items()}


def _held(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _weight_files(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return read_header(file)


def _base_dtypes(base: Path) -> Callable[[str], torch.dtype]:
    """The dtype that a tensor has in the base; for a name that is not there, the commonest."""
    known: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for path in _weight_files(base):
        for name, tensor in _header(path).items():
            dtype = known[name] = TORCH_DTYPES[tensor["dtype"]]
            if dtype.is_floating_point:
                start, end = tensor["data_offsets"]
                sizes[dtype] += end - start
    commonest = sizes.most_common(1)[0][0] if sizes else torch.float32
    return lambda name: known.get(name, commonest)


def base_state(base: Path) -> dict[str, torch.Tensor]:
    """The base's own parameters in fp32, by their transformers names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    return dict(model.state_dict())
