"""JSON files of a model directory: an object, or a fault that says what to do."""

import json
from pathlib import Path
from typing import Any

from cptjob_trainer.errors import DataError, MissingInputError


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises MissingInputError, DataError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; copy the file again")
    return value
