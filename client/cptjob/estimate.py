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

from cptjob_api.facts import ModelFacts
from cptjob_trainer import devices
from cptjob_trainer.config import DatasetInput, TrainerConfig
from cptjob_trainer.data import advice, documents, request, shares
from cptjob_trainer.data.shares import Share
from cptjob_trainer.devices import DEVICES, Demand, Device, Memory
from cptjob_trainer.errors import DataError, Fault, MissingInputError, UsageError
from cptjob_trainer.model import model_config, modeldir
from cptjob_trainer.training.narrator import duration, si
from cptjob_trainer.words import counted

# A token has log2(vocabulary) bits, and of English text they stand for about two bits a byte: 2.75
# bytes under 2k tokens and 4.25 under 128k. Other languages have less.
BITS_PER_BYTE = 4.0
# Part of the peak that training reaches on a GPU without tuning.
DEFAULT_MFU = 0.35


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int

    @property
    def bytes_per_token(self) -> float:
        """Of the files of a data set."""
        return math.log2(max(2, self.vocabulary)) / BITS_PER_BYTE

    @classmethod
    def read(cls, directory: Path) -> "Shape":
        """From config.json and the safetensors headers. Raises what `run` says of such a model."""
        try:
            facts = ModelFacts.from_directory(directory)
        except (MissingInputError, DataError):
            modeldir.check_model(directory)
            raise
        if facts.parameters is None:
            modeldir.check_model(directory)
            raise MissingInputError(f"{directory}: no readable .safetensors weights to count")
        config = json.loads((directory / "config.json").read_bytes())

        def known(what: str, number: int | None) -> int:
            if number is None:
                raise DataError(f"{directory}/config.json: does not say the {what} of the model")
            return number

        return cls(
            facts.parameters,
            known("number of layers", model_config.layers(config)),
            known("hidden size", model_config.width(config)),
            known("vocabulary size", model_config.vocab_size(config)),
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a job, the tokens of all of them, and where the numbers come from."""

    total: int
    tokens: float
    tokens_are_counted: bool


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all devices, and why that number is used."""

    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """The whole answer. Hours are None when no speed is known."""

    shape: Shape
    rows: Rows
    steps: int
    tokens: int
    devices: int
    memory: Memory
    recomputed: bool
    speed: Speed | None

    @property
    def hours(self) -> float | None:
        return self.tokens / self.speed.tokens_per_second / 3600 if self.speed else None

    @property
    def device_hours(self) -> float | None:
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
    rows = count_rows(config, shape)
    steps = shares.steps(rows.total, training.global_batch_size, training.max_steps)
    drawn = shares.drawn(rows.total, training.global_batch_size, steps) / rows.total
    count = config.processes.world_size
    needs = demand(config, shape, count)
    room = None if device is None else find_device(device).memory
    recomputed = needs.recomputed(training.activation_checkpointing, room)
    return Estimate(
        shape=shape,
        rows=rows,
        steps=steps,
        tokens=round(rows.tokens * drawn),
        devices=count,
        memory=needs.memory(recomputed=recomputed),
        recomputed=recomputed,
        speed=_speed(config, shape, count, tokens_per_second, device, mfu, recomputed),
    )


# --- rows -----------------------------------------------------------------------------------------


def count_rows(config: TrainerConfig, shape: Shape) -> Rows:
    """Rows of all epochs, General text included, by the arithmetic of the training."""
    counted = _prepared(config)
    parts = counted or [_guess(config, shape, dataset) for dataset in config.datasets]
    sources = [
        Share(dataset.name, dataset.role == "General", part.rows, dataset.weight)
        for dataset, part in zip(config.datasets, parts, strict=True)
    ]
    drawn = shares.quotas(sources, config.training.epochs)
    tokens = sum(q * part.tokens / part.rows for q, part in zip(drawn, parts, strict=True))
    return Rows(sum(drawn), tokens, tokens_are_counted=counted is not None)


@dataclass(frozen=True)
class _Part:
    """What a data set has to train on."""

    rows: int
    tokens: int


def _guess(config: TrainerConfig, shape: Shape, dataset: DatasetInput) -> _Part:
    """By the size of the files; a split takes its part of each. Raises what `run` says of them."""
    faults: list[Fault] = []
    size = sum(file.stat().st_size for file in documents.files(dataset.path, faults))
    if faults:
        raise DataError(faults=faults)
    given = {held_out.role for held_out in config.validation.datasets}
    held_out = 0.0 if dataset.role in given else config.validation.split_percent / 100
    tokens = (1 - held_out) * size / shape.bytes_per_token
    rows = max(1, math.ceil(tokens / config.training.max_length))
    return _Part(rows, rows * config.training.max_length)


def _prepared(config: TrainerConfig) -> list[_Part] | None:
    """Each data set where exactly these were prepared, whatever the epochs and weights."""
    try:
        wanted = request.digest(config)
    except MissingInputError:
        return None  # without a tokenizer, nothing was prepared
    for file in config.paths.prepared.glob("*/prepared.json"):
        value = _read(file)
        if value is not None and value.get("request") == wanted:
            parts = [_Part(entry["rows"], entry["tokens"]) for entry in value["sources"]]
            if len(parts) == len(config.datasets):
                return parts
    return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# --- memory ---------------------------------------------------------------------------------------


def demand(config: TrainerConfig, shape: Shape, count: int) -> Demand:
    """What the job asks of each of `count` devices."""
    training = config.training
    return Demand(
        parameters=shape.parameters,
        trained=_trained(config, shape),
        layers=shape.layers,
        width=shape.hidden,
        vocabulary=shape.vocabulary,
        tokens=training.batch_size_per_device * training.max_length,
        item=4 if training.precision == "Float32" else 2,
        devices=count,
    )


def _trained(config: TrainerConfig, shape: Shape) -> int:
    """Weights that are trained; for adapters, on the seven matrices of a layer."""
    lora = config.training.lora
    if config.training.method != "LoRA" or lora is None:
        return shape.parameters
    return 7 * shape.layers * lora.rank * 2 * shape.hidden


# --- speed ----------------------------------------------------------------------------------------


def flops_per_token(config: TrainerConfig, shape: Shape, recomputed: bool) -> float:
    """What a device computes for a token: a third more than the training needs when recomputed."""
    training = config.training
    flops = devices.flops_per_token(
        shape.parameters,
        shape.layers,
        shape.hidden,
        training.max_length,
        frozen=training.method == "LoRA",
    )
    return flops * 4 / 3 if recomputed else flops


def _speed(
    config: TrainerConfig,
    shape: Shape,
    count: int,
    given: float | None,
    device: str | None,
    mfu: float,
    recomputed: bool,
) -> Speed | None:
    if given is not None:
        return Speed(given, "--tokens-per-second")
    if device is not None:
        flops = find_device(device).flops
        each = flops * mfu / flops_per_token(config, shape, recomputed)
        return Speed(each * count, f"{count} x {device} at {mfu:.0%} of {si(flops)}FLOP/s")
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


def warnings(config: TrainerConfig, answer: Estimate) -> list[str]:
    """What the estimated steps already tell of the job."""
    return advice.of_run(config, answer.steps)


def render(
    config: TrainerConfig, answer: Estimate, device: str | None, *, on_gpus: bool = False
) -> str:
    """The estimate for a person. `on_gpus`: the job asks for GPUs, whatever --device says."""
    training = config.training
    known = "counted in the prepared data"
    rule = f"{answer.shape.bytes_per_token:.3g} bytes a token"
    layers = counted(answer.shape.layers, "layer")
    guessed = f"estimated from the size of the files at {rule}; `cptjob prepare` counts them"
    lines = [
        ("model", f"{si(answer.shape.parameters)} parameters, {layers}"),
        ("steps", f"{answer.steps:,}, each {training.global_batch_size} x {training.max_length}"),
        (
            "tokens",
            f"{answer.tokens:,}, {known if answer.rows.tokens_are_counted else guessed}",
        ),
        ("devices", f"{answer.devices}"),
        *_memory_lines(config, answer, device),
        *_time_lines(answer, on_gpus=on_gpus or device is not None),
    ]
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def _memory_lines(
    config: TrainerConfig, answer: Estimate, device: str | None
) -> list[tuple[str, str]]:
    part = answer.memory
    total = _size(part.total)
    if device is not None:
        total += f", which {_fits(config, answer, find_device(device).memory)}"
    parts = [
        ("  weights", part.weights),
        ("  gradients", part.gradients),
        ("  optimizer", part.optimizer),
        ("  activations", part.activations),
        ("  logits", part.logits),
    ]
    return [("memory per device", total), *((name, _size(size)) for name, size in parts)]


def _fits(config: TrainerConfig, answer: Estimate, room: int) -> str:
    """Auto is said: the figures are then not those of the manifest's own words."""
    fits = answer.memory.fits(room)
    chosen = answer.recomputed and config.training.activation_checkpointing == "Auto"
    how = f"{'' if fits else ', even'} with activation checkpointing" if chosen else ""
    return f"{'fits' if fits else 'does NOT fit'} in {_size(room)}{how}"


def _size(size: int) -> str:
    """Bytes with three digits and the unit that suits them."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def _time_lines(answer: Estimate, *, on_gpus: bool) -> list[tuple[str, str]]:
    if answer.speed is None or answer.hours is None or answer.device_hours is None:
        return [("time", "not known; give --tokens-per-second N or --device NAME")]
    return [
        ("speed", f"{si(answer.speed.tokens_per_second)} tokens/s, by {answer.speed.source}"),
        ("time", _time(answer.hours * 3600)),
        (
            "GPU-hours" if on_gpus else "device-hours",
            f"{_hours(answer.device_hours)} ({counted(answer.devices, 'device')})",
        ),
    ]


def _time(seconds: float) -> str:
    """Without what comes before and after training: preparing, loading, evaluating, saving."""
    if seconds < 1:
        return "less than a second of training"
    return f"{duration(seconds)} ({_hours(seconds / 3600)} hours) of training"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.01 else "less than 0.01"
