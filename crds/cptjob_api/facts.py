"""What a model directory says about itself, read without torch."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from cptjob_trainer.config import Strict
from cptjob_trainer.errors import DataError, Fault, MissingInputError
from cptjob_trainer.model import model_config, safetensors_header


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
        model_type = config.get("model_type")
        return cls(
            model_type=model_type if isinstance(model_type, str) else "",
            max_positions=model_config.max_positions(config),
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
            with file.open("rb") as stream:
                header = safetensors_header.read(stream)
        except (OSError, ValueError):
            return None  # prepare says what is wrong with the file
        total += sum(tensor.numbers for tensor in header.tensors)
    return total or None
