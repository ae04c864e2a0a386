"""Time to the first step at 1 % and at 90 % of a corpus of 100 MB, each in a fresh process.

Two figures. *rows*: open the prepared data, find the rows of a step and read them. *step*: the real
trainer on a tiny model, from its start (imports done) to the end of its first step. A checkpoint is
as large at either place, so its loading is left out: the trainer is told which step it is at.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import results

ROOT = Path(__file__).resolve().parent.parent
PLACES = (0.01, 0.9)
LENGTH = 512
BATCH = 8
# What the figures are of.
FILES = [
    "bench/resume.py",
    *results.trainer("prepared mix rows tables batcher components worker loop"),
]


def prepared_data(model: Path, data: Path, output: Path) -> Path:
    """Prepare `data` for the trainer; returns the directory. The configuration lies beside it."""
    import jobs

    from cptjob_trainer.config import Paths, ValidationInput
    from cptjob_trainer.data.prepare import prepare

    config = jobs.make(model, data, Paths(output=output), LENGTH, BATCH, epochs=3).model_copy(
        update={"validation": ValidationInput(split_percent=0.0)}
    )
    config.dump(output / "config.json")
    return prepare(config, packs=lambda _: True).directory


def rows_arm(prepared: Path, _config: Path, place: float) -> float:
    """Seconds to open the data and read the rows of one step."""
    from cptjob_trainer.data.prepared import load_prepared

    start = time.perf_counter()
    data = load_prepared(prepared)
    mix = data.mix(seed=0)
    first = int(place * data.total_steps) * BATCH
    for number in range(first, first + BATCH):
        source, row = mix.locate(number)
        data.sources[source].row(row)
    return time.perf_counter() - start


def step_arm(prepared: Path, config: Path, place: float) -> float:
    """Seconds until the trainer has finished a step."""
    from cptjob_trainer.checkpoint.state import LoopState
    from cptjob_trainer.data.prepared import load_prepared
    from cptjob_trainer.run import worker
    from cptjob_trainer.training.loop import Trainer

    class Done(Exception):
        pass

    class OneStep(Trainer):
        def _record(self, *_: object) -> None:
            raise Done

    os.environ["CPTJOB_PREPARED"] = str(prepared)
    step = int(place * load_prepared(prepared).total_steps)
    worker.LoopState = partial(LoopState, step=step)  # type: ignore[misc,assignment]
    worker.Trainer = OneStep  # type: ignore[misc]
    start = time.perf_counter()
    try:
        worker.main(str(config))
    except Done:
        return time.perf_counter() - start
    raise SystemExit("the trainer ended without a step")


ARMS: dict[str, Callable[[Path, Path, float], float]] = {"rows": rows_arm, "step": step_arm}


def measure(arm: str, prepared: Path, config: Path, place: float) -> float:
    """One arm in a fresh process, in seconds."""
    command = [sys.executable, __file__, "--arm", arm, str(prepared), str(config), str(place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"the arm {arm} failed:\n{ended.stderr}")
    seconds: float = json.loads(ended.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "volumes/models/tiny")
    parser.add_argument("--megabytes", type=int, default=105)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm, prepared, config, place = options.arm
        print(json.dumps(ARMS[arm](Path(prepared), Path(config), float(place))))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """All arms in turn, and the table."""
    import texts

    with tempfile.TemporaryDirectory(prefix="bench-resume-") as scratch:
        data, output = Path(scratch) / "data.jsonl", Path(scratch) / "output"
        texts.write(data, options.megabytes * 10**6)
        size = data.stat().st_size / 1e6
        prepared = prepared_data(options.model, data, output)
        config = output / "config.json"
        rows = []
        for arm in ARMS:
            # The first run fills the file cache.
            measure(arm, prepared, config, PLACES[0])
            rounds = [
                [measure(arm, prepared, config, place) for place in PLACES]
                for _ in range(options.rounds)
            ]
            early, late = (median(column) for column in zip(*rounds, strict=True))
            ratio = median(last / first for first, last in rounds)
            rows.append([arm, f"{early * 1000:.0f}", f"{late * 1000:.0f}", f"{ratio:.2f}"])
            print(*rows[-1], flush=True)
    results.write(
        "resume",
        f"{size:.0f} MB of JSONL, {BATCH} rows of {LENGTH} tokens a step, model "
        f"{options.model.name}, {options.rounds} rounds in turn, medians.\n\n"
        + results.table(["to the first", "at 1 %, ms", "at 90 %, ms", "ratio"], rows)
        + "\n\nTarget: the same at both places.",
        FILES,
    )


if __name__ == "__main__":
    main()
