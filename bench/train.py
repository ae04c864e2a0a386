"""Training speed and peak memory against Hugging Face's Trainer.

    python bench/train.py [--models tiny,smollm2-135m] [--rounds 3] [--steps N] [--length N]
                          [--batch N] [--device auto] [--json OUT]

Each arm runs in a fresh process, one after another, round by round (A B C, A B C, ...), on the same
packed rows in the same order. Speed is the median over rounds of the median step; ratios are taken
within a round. Losses of all arms are compared step by step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jobs
import results

from cptjob_trainer.config import Paths, ResolvedSchedule, TrainerConfig
from cptjob_trainer.data.prepare import prepare
from cptjob_trainer.data.prepared import Prepared

ROOT = Path(__file__).resolve().parent.parent
BASE = "HF as it comes"
# What the figures are of.
FILES = [
    "bench/train.py",
    "bench/train_arm.py",
    *results.trainer(
        "loop model loss attention document_attention optimizer batch components"
        " compiling activations sharding pretrained"
    ),
]


@dataclass(frozen=True)
class Arm:
    """One way to train. `flags`: what the peer is given beside bf16=True."""

    name: str
    side: str
    compile: str = "Never"
    activation_checkpointing: str = "None"
    attention: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    only: str | None = None  # a device type


# A run during which others kept more cores than this busy is repeated.
QUIET = 0.15
ATTEMPTS = 3

ARMS = (
    Arm("ours", "ours"),
    Arm("ours compiled", "ours", compile="Always"),
    Arm("ours checkpointed", "ours", activation_checkpointing="Full"),
    Arm(BASE, "peer"),
    Arm("HF compiled", "peer", flags={"torch_compile": True}),
    # The CPU's own attention kernel is slow on short rows.
    Arm(
        "HF compiled, eager attention",
        "peer",
        attention="eager",
        flags={"torch_compile": True},
        only="cpu",
    ),
)


@dataclass(frozen=True)
class Size:
    """What a model is trained with, by device type: length, rows of a step, steps, warm-up steps."""

    length: int
    batch: int
    steps: int
    warmup: int


SIZES = {
    ("tiny", "cpu"): Size(512, 8, 22, 8),
    ("smollm2-135m", "cpu"): Size(1024, 1, 5, 2),
    ("tiny", "cuda"): Size(512, 8, 120, 20),
    ("smollm2-135m", "cuda"): Size(1024, 16, 60, 10),
}


def make_config(model: Path, text: Path, size: Size, arm: Arm, output: Path) -> TrainerConfig:
    return jobs.make(
        model,
        text,
        Paths(output=output, prepared=output.parent / "prepared"),
        size.length,
        size.batch,
        compile=arm.compile,
        epochs=100,
        max_steps=size.steps,
        precision="BFloat16",
        activation_checkpointing=arm.activation_checkpointing,
        schedule=ResolvedSchedule(type="Constant", warmup_steps=0, min_learning_rate=0.0),
    )


def run_arm(
    arm: Arm,
    config: TrainerConfig,
    prepared: Prepared,
    size: Size,
    device: str,
    profile: str | None,
) -> dict[str, Any]:
    """Run one arm in a fresh process and return its figures."""
    output = config.paths.output
    output.mkdir(parents=True, exist_ok=True)
    config.dump(output / "config.json")
    spec = {
        "side": arm.side,
        "config": str(output / "config.json"),
        "prepared": str(prepared.directory),
        "output": str(output),
        "device": device,
        "steps": size.steps,
        "warmup": size.warmup,
        "attention": arm.attention,
        "flags": dict(arm.flags),
        "profile": profile,
    }
    (output / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(ROOT / "bench" / "train_arm.py"), str(output / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise SystemExit(f"{arm.name} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_quietly(patience: float, *args: Any) -> dict[str, Any]:
    """`run_arm` when the machine is quiet, again when it did not stay so. patience: seconds to wait."""
    deadline = time.monotonic() + patience
    best: dict[str, Any] = {}
    for _ in range(ATTEMPTS):
        while busy_cores() > QUIET and time.monotonic() < deadline:
            time.sleep(3)
        figures = run_arm(*args)
        if not best or figures["others"] < best["others"]:
            best = figures
        if best["others"] <= QUIET or time.monotonic() > deadline:
            break
    return best


def busy_cores() -> float:
    """Cores in use right now, this process sleeping."""

    def busy() -> float:
        user, nice, system, _, _, _, _, steal, *_ = Path("/proc/stat").read_text().split()[1:]
        return sum(map(int, (user, nice, system, steal))) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(1)
    return busy() - before


def environment() -> dict[str, str]:
    """As the launcher starts a worker: one thread a core."""
    paths = [str(ROOT / part) for part in ("trainer", "crds", "client")]
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    found = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([found] if found else [])]),
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }


# --- results --------------------------------------------------------------------------------------


def loss_difference(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> float:
    """Largest relative difference to the base's loss, over all steps of all rounds."""
    return max(
        abs(ours - theirs) / theirs
        for run, other in zip(runs, base, strict=True)
        for ours, theirs in zip(run["losses"], other["losses"], strict=True)
    )


def ratio(mine: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]]) -> str:
    """How many times the peer's speed: the median over rounds, and the range."""
    found = [b["seconds"] / m["seconds"] for m, b in zip(mine, peer, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def table(runs: Mapping[str, list[dict[str, Any]]], tokens: int) -> list[str]:
    """Markdown rows, an arm each. Ratios are medians over rounds, with their range."""
    base = runs[BASE]
    lines = [
        "| arm | s/step | tokens/s | speed vs HF as it comes | peak memory | of HF's | process peak "
        "| warm-up s | loss diff. | other load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in runs.items():
        seconds = statistics.median(run["seconds"] for run in mine)
        shares = [m["memory"] / b["memory"] for m, b in zip(mine, base, strict=True)]
        plain = statistics.median(run["memory_plain"] for run in mine)
        lines.append(
            f"| {name} | {seconds:.4g} | {tokens / seconds:,.0f} "
            f"| {ratio(mine, base)} "
            f"| {statistics.median(run['memory'] for run in mine) / 2**20:,.0f} MiB "
            f"| {statistics.median(shares):.2f} | {plain / 2**20:,.0f} MiB "
            f"| {statistics.median(run['warmup_seconds'] for run in mine):.1f} "
            f"| {loss_difference(mine, base):.1e} | {max(run['others'] for run in mine):.2f} |"
        )
    return lines


def against_each(runs: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown rows: each of our arms against each way to make the peer faster."""
    sides = {arm.name: arm.side for arm in ARMS}
    ours = [name for name in runs if sides[name] == "ours"]
    peers = [name for name in runs if sides[name] == "peer" and name != BASE]
    return [
        "| speed of | " + " | ".join(f"vs {name}" for name in peers) + " |",
        "|---|" + "---|" * len(peers),
        *(
            f"| {name} | " + " | ".join(ratio(runs[name], runs[peer]) for peer in peers) + " |"
            for name in ours
        ),
    ]


def machine(device: str) -> str:
    """The machine and the versions, in a line."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        name = gpus.splitlines()[0]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{name}, {len(os.sched_getaffinity(0))} cores; {versions}; commit {commit or 'unknown'}"


def body(where: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The section of RESULTS.md."""
    parts = [where]
    for result in found:
        size = result["size"]
        parts.append(
            f"{result['model']}: a step of {size['batch']} x {size['length']} tokens, bf16, "
            f"{result['rounds']} rounds in turn, medians (range); memory is on top of the imports'."
        )
        parts.append("\n".join(table(result["runs"], size["batch"] * size["length"])))
        parts.append("\n".join(against_each(result["runs"])))
    return "\n\n".join(parts)


# --- the run --------------------------------------------------------------------------------------


def bench_model(
    name: str, options: argparse.Namespace, device: str, scratch: Path
) -> dict[str, Any]:
    size = SIZES.get((name, device)) or SIZES["smollm2-135m", device]
    size = Size(
        options.length or size.length,
        options.batch or size.batch,
        options.steps or size.steps,
        size.warmup if options.warmup is None else options.warmup,
    )
    path, text = options.volumes / "models" / name, options.volumes / "data" / "domain"
    configs = {
        arm.name: make_config(path, text, size, arm, scratch / name / arm.name.replace(" ", "-"))
        for arm in ARMS
        if (not options.arms or arm.name in options.arms) and arm.only in (None, device)
    }
    arms = [arm for arm in ARMS if arm.name in configs]
    prepared = prepare(configs[arms[0].name])
    print(f"{name}: a step of {size.batch} x {size.length} tokens", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    rounds = options.rounds or (3 if (path / "model.safetensors").stat().st_size < 1e8 else 1)
    for number in range(rounds):
        for arm in arms:
            began = time.monotonic()
            profile = str(options.profile / f"{name} {arm.name}.txt") if options.profile else None
            figures = run_quietly(
                options.patience, arm, configs[arm.name], prepared, size, device, profile
            )
            runs[arm.name].append(figures)
            print(
                f"  round {number + 1}/{rounds} {arm.name:28s} {figures['seconds']:8.4f} s/step "
                f"(cpu {figures['cpu_seconds']:.4f})"
                f"{figures['memory'] / 2**20:8.0f} MiB  others {figures['others']:.2f} cores  "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    if BASE in runs:
        print("\n".join(table(runs, size.batch * size.length)), flush=True)
    return {"model": name, "size": asdict(size), "rounds": rounds, "runs": runs}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="tiny,smollm2-135m", help="names under volumes/models")
    parser.add_argument(
        "--rounds", type=int, help="default 3, and 1 with more than 100 MB of model"
    )
    parser.add_argument("--steps", type=int, help="of each run, warm-up included")
    parser.add_argument("--warmup", type=int, help="steps that are not measured")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--patience",
        type=float,
        default=60,
        help="seconds to wait for a quiet machine, for each arm",
    )
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[])
    parser.add_argument("--volumes", type=Path, default=ROOT / "volumes")
    parser.add_argument("--record", action="store_true", help="write the tables into RESULTS.md")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--profile", type=Path, help="write tables of operators into this folder")
    return parser.parse_args()


def find_device(asked: str) -> str:
    if asked != "auto":
        return asked
    # Asked of a process of its own: this one stays small.
    code = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    options = parse()
    device = find_device(options.device)
    print(machine(device), flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        for name in options.models.split(","):
            found.append(bench_model(name, options, device, Path(scratch)))  # noqa: PERF401
    if options.record:
        results.write(
            f"training on a {'CPU' if device == 'cpu' else 'GPU'}",
            body(machine(device), found),
            FILES,
        )
    if options.json:
        value = {"machine": machine(device), "device": device, "results": found}
        options.json.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
