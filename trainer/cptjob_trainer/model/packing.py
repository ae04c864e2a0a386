"""Whether documents may share a row: the architecture is tried once, and the answer remembered.

Trying an architecture imports torch and takes seconds: a process of its own does that while
documents are read, and is ended when these turn out to be broken. It looks first whether the weights
are those of the model that is tried.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from cptjob_trainer import lifeline
from cptjob_trainer.errors import CPTJobError, DataError
from cptjob_trainer.model.modeldir import ModelInfo


@contextmanager
def trial(
    model: ModelInfo,
    directory: Path,
    remember: Callable[[Path, bool], None],
    packs: Callable[[Path], bool] | None = None,
) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether documents share rows.

    What is known of the architecture lies in `directory`; `remember(path, answer)` puts it there.
    `packs(model_dir)` answers in the place of isolation.packs.
    """
    path = directory / f"packs-{_name(model.config)}.json"
    known = _known(path)
    if known is not None:
        yield lambda: bool(known)
        return

    def remembered(answer: bool) -> bool:
        remember(path, answer)
        return answer

    if packs is not None:
        yield lambda: remembered(packs(model.path))
        return
    with Trial(model.path) as started:
        yield lambda: remembered(started.result())


def _name(config: dict[str, Any]) -> str:
    parts = [json.dumps(config, sort_keys=True), metadata.version("transformers")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _known(path: Path) -> bool | None:
    try:
        return bool(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


class Trial:
    """model_fit.check(model), then isolation.packs(model), in a process of its own."""

    _PROGRAM = """
import json, signal, sys
from pathlib import Path
from cptjob_trainer import lifeline
from cptjob_trainer.errors import DataError
lifeline.follow_parent(signal.SIGKILL) or sys.exit("its parent is gone")
from cptjob_trainer.model import isolation, model_fit
model = Path(sys.argv[1])
try:
    model_fit.check(model)
except DataError as error:
    print(json.dumps({"refused": str(error)}))
else:
    print(json.dumps({"packs": isolation.packs(model)}))
"""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, str(model)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, lifeline.PARENT_VARIABLE: str(os.getpid())},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def result(self) -> bool:
        """Whether documents may share a row. Raises DataError for weights of another model."""
        output, errors = self._process.communicate()
        if self._process.returncode != 0 or not output:
            last = (errors.strip().splitlines() or ["it was killed"])[-1]
            raise CPTJobError(f"the model's architecture could not be tried: {last}")
        said = json.loads(output.splitlines()[-1])
        if "refused" in said:
            raise DataError(said["refused"])
        return bool(said["packs"])
