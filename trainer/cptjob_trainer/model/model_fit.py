"""Whether the weights of a directory are those of the model that its config.json describes.

transformers gives random numbers to what is missing or has another shape, and warns of it in a log.
What it reports of loading is the truth here: it knows ties, renamings and what may be left out.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cptjob_trainer.errors import DataError, MissingInputError
from cptjob_trainer.model import model_weights
from cptjob_trainer.model.safetensors_file import TORCH_DTYPES

# How many names a message shows before it only counts them.
_SHOWN: Final = 3


def read_config(path: Path) -> Any:
    """The configuration as transformers reads it. Raises DataError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each architecture checks in its own way
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path / 'config.json'}: transformers cannot read it: {reason}; copy the file again"
        ) from error


def check(path: Path) -> None:
    """Load without the values: only the heads of the files are read. Raises DataError."""
    from transformers import AutoModelForCausalLM, logging

    config = read_config(path)
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # sizes that do not go together, found by whatever divides them
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path / 'config.json'}: describes a model that cannot be made: {reason}; copy the "
            "file again"
        ) from error
    state = {
        tensor.name: torch.empty(
            tensor.shape, dtype=TORCH_DTYPES.get(tensor.dtype, torch.float32), device="meta"
        )
        for file in sorted(path.glob("*.safetensors"))
        for tensor in model_weights.header(file).tensors
    }
    try:
        lm, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError:
        return  # a conversion that needs values; whoever loads them learns the same
    refuse(path, lm.state_dict().keys(), report)


def refuse(path: Path, names: Iterable[str], report: Mapping[str, Any]) -> None:
    """Refuse what has not filled the model, and weights of layers that it does not have.

    names, report: of the model's tensors, and what transformers says of loading. A tensor that is
    like none of the model's belongs to something else, such as a head for another task, and stays
    in transformers' warning. Raises DataError.
    """
    if wrong := sorted(report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
        raise DataError(
            f"{_file(path, name)}: the tensor {name} has the shape {_shape(found)}, and the model "
            f"that config.json describes has {_shape(wanted)}{more}; copy config.json and weights "
            "of one model"
        )
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"{path}: the weights lack {_some(missing)}, which the model that config.json describes "
            "has; copy all weights again, and the config.json that belongs to them"
        )
    known = {_kind(name) for name in names}
    if extra := sorted(name for name in report["unexpected_keys"] if _kind(name) in known):
        raise DataError(
            f"{path}: the weights have {_some(extra)}, for which the model that config.json "
            "describes has no place; copy config.json and weights of one model"
        )


def _kind(name: str) -> str:
    """The name of a tensor without the numbers of layers and experts."""
    return re.sub(r"\d+", "N", name)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {shown}{more}"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "of a single number"


def _file(path: Path, name: str) -> Path:
    """Where a tensor lies, or the directory when it has another name there."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            if any(tensor.name == name for tensor in model_weights.header(file).tensors):
                return file
        except (DataError, MissingInputError):
            continue
    return path
