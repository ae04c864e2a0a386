"""How long a job takes and what it needs, before it runs. Reads headers and samples only, no torch.

Tokens come from prepared data when there is some, else from the bytes of the files. The formulas
are rules of thumb and are shown with their parts, so that a person can judge them.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptjob.live import duration, si
from cptjob_api.facts import ModelFacts
from cptjob_trainer import request, shares
from cptjob_trainer.config import DatasetInput, TrainerConfig
from cptjob_trainer.errors import DataError, MissingInputError, UsageError
from cptjob_trainer.shares import Share

# English text under a vocabulary of 32k to 128k; other languages and small vocabularies have less.
BYTES_PER_TOKEN = 4.0
# Part of the peak that training reaches on a GPU without tuning.
DEFAULT_MFU = 0.35

GIB = 1 << 30
# Loss is taken over pieces of the rows of which the logits fit in this.
LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class Device:
    """Peak bf16 FLOP/s without sparsity and memory, from the vendor's data sheet."""

    flops: float
    memory: int


DEVICES = {
    "H200": Device(989e12, 141_000_000_000),
    "H100": Device(989e12, 80_000_000_000),
    "A100-80GB": Device(312e12, 80_000_000_000),
    "A100": Device(312e12, 40_000_000_000),
    "L40S": Device(362e12, 48_000_000_000),
    "L4": Device(121e12, 24_000_000_000),
    "V100": Device(125e12, 16_000_000_000),
}


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def read(cls, directory: Path) -> "Shape":
        """From config.json and the safetensors headers. Raises MissingInputError or DataError."""
        facts = ModelFacts.from_directory(directory)
        if facts.parameters is None:
            raise MissingInputError(f"{directory}: no readable .safetensors weights to count")
        config = json.loads((directory / "config.json").read_bytes())
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config

        def number(*names: str) -> int:
            for name in names:
                if isinstance(text.get(name), int):
                    return int(text[name])
            raise DataError(f"{directory}/config.json: has none of {', '.join(names)}")

        return cls(
            facts.parameters,
            number("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
            number("hidden_size", "n_embd", "d_model"),
            number("vocab_size"),
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a job and where the number comes from."""

    total: int
    tokens_are_counted: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all devices, and why that number is used."""

    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """The whole answer. Hours and GPU-hours are None when no speed is known."""

    shape: Shape
    rows: Rows
    steps: int
    tokens: int
    devices: int
    memory: Memory
    speed: Speed | None

    @property
    def hours(self) -> float | None:
        return self.tokens / self.speed.tokens_per_second / 3600 if self.speed else None

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.devices


def estimate(
    config: TrainerConfig,
    *,
    tokens_per_second: float | None = None,
    device: str | None = None,
    mfu: float = DEFAULT_MFU,
) -> Estimate:
    """Estimates a job. Speed: given, else of an earlier run of this output, else of a device."""
    training = config.training
    shape = Shape.read(config.model.path)
    rows = count_rows(config)
    steps = shares.steps(rows.total, training.global_batch_size, training.max_steps)
    devices = config.processes.world_size
    return Estimate(
        shape=shape,
        rows=rows,
        steps=steps,
        tokens=min(rows.total, steps * training.global_batch_size) * training.max_length,
        devices=devices,
        memory=memory(config, shape, devices),
        speed=_speed(config, shape, devices, tokens_per_second, device, mfu),
    )


# --- rows -----------------------------------------------------------------------------------------


def count_rows(config: TrainerConfig) -> Rows:
    """Rows of all epochs, General text included, by the arithmetic of the training."""
    counted = _prepared(config)
    rows = counted or [_guess(config, dataset) for dataset in config.datasets]
    sources = [
        Share(dataset.name, dataset.role == "General", number, dataset.weight)
        for dataset, number in zip(config.datasets, rows, strict=True)
    ]
    total = sum(shares.quotas(sources, config.training.epochs))
    return Rows(total, tokens_are_counted=counted is not None)


def _guess(config: TrainerConfig, dataset: DatasetInput) -> int:
    """Rows of a data set from the size of its files; a split takes its part of each."""
    size = sum(file.stat().st_size for file in request.files(dataset.path))
    given = {held_out.role for held_out in config.validation.datasets}
    held_out = 0.0 if dataset.role in given else config.validation.split_percent / 100
    tokens = (1 - held_out) * size / BYTES_PER_TOKEN
    return max(1, math.ceil(tokens / config.training.max_length))


def _prepared(config: TrainerConfig) -> list[int] | None:
    """Rows of each data set where exactly these were prepared, whatever the epochs and weights."""
    try:
        wanted = request.digest(config)
    except MissingInputError:
        return None  # without a tokenizer, nothing was prepared
    for file in config.paths.prepared.glob("*/prepared.json"):
        value = _read(file)
        if value is not None and value.get("request") == wanted:
            rows = [entry["rows"] for entry in value["sources"]]
            if len(rows) == len(config.datasets):
                return rows
    return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# --- memory ---------------------------------------------------------------------------------------


def memory(config: TrainerConfig, shape: Shape, devices: int) -> Memory:
    """Bytes on one device while it trains.

    Weights, gradients and AdamW's two moments are 32-bit numbers, split over the devices. A layer's
    activations are 34 bytes a token and hidden unit in 16 bits (Korthikanti et al. 2022, without
    attention scores, which are never kept), twice that in 32 bits; recomputed, only its input is.
    """
    training = config.training
    trained = _trained(config, shape)
    width = 4 if training.precision == "Float32" else 2
    tokens = training.batch_size_per_device * training.max_length
    layer = 17 * width * tokens * shape.hidden
    if training.activation_checkpointing == "Full":
        activations = shape.layers * width * tokens * shape.hidden + layer
    else:
        activations = shape.layers * layer
    return Memory(
        weights=4 * shape.parameters // devices,
        gradients=4 * trained // devices,
        optimizer=8 * trained // devices,
        activations=activations,
        # Logits in 32 bits and their gradient.
        logits=min(2 * 4 * tokens * shape.vocabulary, LOGITS_BYTES),
    )


def _trained(config: TrainerConfig, shape: Shape) -> int:
    """Weights that are trained; for adapters, on the seven matrices of a layer."""
    lora = config.training.lora
    if config.training.method != "LoRA" or lora is None:
        return shape.parameters
    return 7 * shape.layers * lora.rank * 2 * shape.hidden


# --- speed ----------------------------------------------------------------------------------------


def flops_per_token(config: TrainerConfig, shape: Shape) -> float:
    """Forward and backward; 6 per weight, causal attention, a third more when recomputed."""
    flops = 6.0 * shape.parameters
    if config.training.method == "LoRA":
        flops = 4.0 * shape.parameters  # no gradients of the frozen weights
    flops += 6.0 * shape.layers * shape.hidden * config.training.max_length
    return flops * 4 / 3 if config.training.activation_checkpointing == "Full" else flops


def _speed(
    config: TrainerConfig,
    shape: Shape,
    devices: int,
    given: float | None,
    device: str | None,
    mfu: float,
) -> Speed | None:
    if given is not None:
        return Speed(given, "--tokens-per-second")
    if device is not None:
        flops = find_device(device).flops
        each = flops * mfu / flops_per_token(config, shape)
        return Speed(each * devices, f"{devices} x {device} at {mfu:.0%} of {si(flops)}FLOP/s")
    measured = _measured(config.paths.output / "metrics.jsonl")
    if measured is not None:
        return Speed(measured, "an earlier run of this output")
    return None


def find_device(name: str) -> Device:
    """Raises UsageError that names the known ones."""
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise UsageError(
        f"--device {name}: not known; give one of {', '.join(DEVICES)}, or --tokens-per-second"
    )


def _measured(path: Path) -> float | None:
    """Median speed of the steps that a run has logged."""
    speeds: list[float] = []
    try:
        with path.open() as file:
            for line in file:
                try:
                    speed = json.loads(line).get("tokensPerSecond")
                except (ValueError, AttributeError):
                    continue
                if isinstance(speed, int | float) and speed > 0:
                    speeds.append(float(speed))
    except OSError:
        return None
    return statistics.median(speeds) if speeds else None


# --- words ----------------------------------------------------------------------------------------


def render(config: TrainerConfig, answer: Estimate, device: str | None) -> str:
    """The estimate for a person."""
    training = config.training
    counted = "counted in the prepared data"
    guessed = f"estimated from the size of the files at {BYTES_PER_TOKEN:g} bytes a token"
    lines = [
        ("model", f"{si(answer.shape.parameters)} parameters, {answer.shape.layers} layers"),
        ("steps", f"{answer.steps:,}, each {training.global_batch_size} x {training.max_length}"),
        (
            "tokens",
            f"{answer.tokens:,}, {counted if answer.rows.tokens_are_counted else guessed}",
        ),
        ("devices", f"{answer.devices}"),
        *_memory_lines(answer, device),
        *_time_lines(answer),
    ]
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def _memory_lines(answer: Estimate, device: str | None) -> list[tuple[str, str]]:
    part = answer.memory
    total = f"{part.total / GIB:.1f} GiB"
    if device is not None:
        room = find_device(device).memory
        fits = "fits" if part.total < 0.9 * room else "does NOT fit"
        total += f", which {fits} in {room / GIB:.0f} GiB"
    parts = [
        ("  weights", part.weights),
        ("  gradients", part.gradients),
        ("  optimizer", part.optimizer),
        ("  activations", part.activations),
        ("  logits", part.logits),
    ]
    lines = [(name, f"{size / GIB:.2f} GiB") for name, size in parts]
    return [("memory per device", total), *lines]


def _time_lines(answer: Estimate) -> list[tuple[str, str]]:
    if answer.speed is None or answer.hours is None or answer.gpu_hours is None:
        return [("time", "not known; give --tokens-per-second N or --device NAME")]
    return [
        ("speed", f"{si(answer.speed.tokens_per_second)} tokens/s, by {answer.speed.source}"),
        ("time", f"{duration(answer.hours * 3600)} ({answer.hours:.2f} hours)"),
        ("GPU-hours", f"{answer.gpu_hours:.2f} ({answer.devices} devices)"),
    ]
