"""What saving and loading a checkpoint costs, beside a plain write of the same bytes and
torch.save.

    python bench/checkpoint.py [--megabytes 256] [--repeats 5]

Every way ends with the bytes durable (fsync). Loading reads from the page cache, as a restart on
the same machine does. `open` is ours alone: it digests every file before it is trusted. Medians are
given.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch

from cptjob_trainer.checkpoint.checkpoints import Checkpoints

# What the figures are of.
FILES = [
    "bench/checkpoint.py",
    *results.trainer(
        "checkpoints checkpoint_folder checkpoint_manifest dcp dcp_storage safetensors_file disk"
    ),
]


def tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """fp32 parameters and AdamW's two moments, in matrices of 4 MB."""
    random = torch.Generator().manual_seed(0)
    names = [f"{kind}.{n}" for n in range(max(1, megabytes // 12)) for kind in ("w", "m", "v")]
    return {name: torch.randn(1024, 1024, generator=random) for name in names}


def write_plain(path: Path, state: dict[str, torch.Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for value in state.values():
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        os.fsync(file.fileno())


def read_plain(path: Path, state: dict[str, torch.Tensor]) -> None:
    with open(path, "rb", buffering=0) as file:
        for value in state.values():
            file.readinto(memoryview(value.reshape(-1).view(torch.uint8).numpy()))


def torch_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(path: Path, state: dict[str, torch.Tensor]) -> None:
    for name, value in torch.load(path, weights_only=True).items():
        state[name].copy_(value)


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turns so that a noisy neighbour disturbs all alike."""
    state = tensors(megabytes)
    into = {name: torch.empty_like(value) for name, value in state.items()}
    seconds: dict[str, list[float]] = {}

    def note(name: str, act: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(act))

    plain, pickled = folder / "plain", folder / "pickled"
    for turn in range(repeats):
        ours = Checkpoints(
            folder / str(turn), uid="bench", lineage={}, keep_last=1, on_mismatch="Refuse"
        )
        ours.open()
        note("save: plain write", lambda: write_plain(plain, state))
        note("save: torch.save", lambda: torch_save(pickled, state))
        note("save: ours, digested", lambda ours=ours: ours.save(1, state, {}))
        note("load: plain read", lambda: read_plain(plain, into))
        note("load: torch.load", lambda: torch_load(pickled, into))
        again = Checkpoints(
            folder / str(turn), uid="bench", lineage={}, keep_last=1, on_mismatch="Refuse"
        )
        note("open: ours, digests checked", again.open)
        resume = again.open()
        assert resume is not None
        note("load: ours", lambda again=again, resume=resume: again.load(resume, into))
        assert all(torch.equal(into[name], value) for name, value in state.items())
        for path in (plain, pickled):
            path.unlink()
        shutil.rmtree(folder / str(turn))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temp")
    options = parser.parse_args()
    size = sum(t.numel() * t.element_size() for t in tensors(options.megabytes).values())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        medians = measure(Path(folder), options.megabytes, options.repeats)
    rows = [
        [name, f"{seconds:.3f}", f"{size / seconds / 1e6:.0f}"] for name, seconds in medians.items()
    ]
    table = results.table(["what", "seconds", "MB/s"], rows)
    body = f"{size / 1e6:.0f} MB, median of {options.repeats}, one process.\n\n{table}"
    print(body)
    results.write("Checkpoints", body, FILES)


if __name__ == "__main__":
    main()
