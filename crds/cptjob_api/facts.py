"""What a model directory says about itself, read without torch."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from cptjob_trainer.config import Strict
from cptjob_trainer.errors import DataError, Fault, MissingInputError

# The names that architectures use for the number of positions, in the order they are tried.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "seq_length",
)


class ModelFacts(Strict):
    """What defaults depend on. None where it is not known."""

    model_type: str = Field(default="", description="Architecture family, such as llama.")
    max_positions: int | None = Field(
        default=None, ge=1, description="Longest row that the model has positions for."
    )
    parameters: int | None = Field(default=None, ge=1, description="Number of weights.")

    @classmethod
    def from_config(cls, config: dict[str, Any], parameters: int | None = None) -> Self:
        """From the contents of a model's config.json."""
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        found = (text.get(name) for name in _POSITIONS)
        positions = next((n for n in found if isinstance(n, int) and n > 0), None)
        model_type = config.get("model_type")
        return cls(
            model_type=model_type if isinstance(model_type, str) else "",
            max_positions=positions,
            parameters=parameters,
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """From a model directory. Raises MissingInputError or DataError."""
        file = directory / "config.json"
        try:
            config = json.loads(file.read_bytes())
        except OSError as error:
            raise MissingInputError(
                f"{directory}: no model directory: its config.json cannot be read "
                f"({error.strerror})"
            ) from error
        except ValueError as error:
            raise DataError(faults=[Fault(str(file), 0, f"not JSON: {error}")]) from error
        if not isinstance(config, dict):
            raise DataError(faults=[Fault(str(file), 0, "not a JSON object")])
        return cls.from_config(config, _parameters(directory))


def _parameters(directory: Path) -> int | None:
    """Weights as the safetensors headers count them; None when there are none to read."""
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        try:
            total += _in_header(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # prepare says what is wrong with the file
    return total or None


def _in_header(file: Path) -> int:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > 100_000_000:
            raise ValueError("no safetensors header is that long")
        header = json.loads(stream.read(size))
    return sum(_product(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
