"""What a run has left in its output so far: who it is, how far it came, and its numbers as columns.

It reads files only, and takes them as they are: a run that is still going or was stopped has no
manifest, and a person may have removed or copied parts of an output.
"""

import fcntl
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cptjob_trainer.data import shares
from cptjob_trainer.data.shares import Share
from cptjob_trainer.errors import ConfigError
from cptjob_trainer.training.metrics import read_metrics

Column = npt.NDArray[np.float64]
State = Literal["Complete", "Running", "Stopped", "Not complete"]

ROLES = ("Domain", "General")


@dataclass(frozen=True)
class Steps:
    """The training steps, one array element each; NaN where a number is unknown."""

    step: Column
    loss: Column
    learning_rate: Column
    grad_norm: Column
    tokens: Column
    tokens_per_second: Column
    seconds: Column
    data_wait: Column
    padding: Column
    mfu: Column
    skipped: npt.NDArray[np.bool_]
    by_source: dict[str, Column]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses after a step, by the names of the metrics."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class SourceRecord:
    """A training source: what there is of it, its asked share of the mix, and what was trained."""

    name: str
    role: str
    documents: int | None
    tokens: int | None
    rows: int | None
    asked_share: float | None
    trained_tokens: int


@dataclass(frozen=True)
class Record:
    """Everything that is known of a run. `step` and `tokens` count what is done, `base` is the base
    model's held-out loss by role."""

    state: State
    name: str
    model: str
    completed: str
    step: int
    total_steps: int | None
    tokens: int
    processes: int | None
    training_seconds: float
    evaluation_seconds: float | None
    settings: dict[str, Any]
    software: dict[str, Any]
    notes: tuple[str, ...]
    sources: tuple[SourceRecord, ...]
    split_percent: float
    base: dict[str, float]
    base_by_source: dict[str, float]
    steps: Steps
    evaluations: tuple[Evaluation, ...]

    def losses(self, role: str) -> list[tuple[int, float]]:
        """(step, held-out loss) of a role, the base model's at step 0."""
        key = f"heldout_{role.lower()}_loss"
        base = [(0, self.base[role])] if role in self.base else []
        return base + [(e.step, e.values[key]) for e in self.evaluations if key in e.values]

    def differences(self, role: str) -> list[tuple[int, float]]:
        """(step, held-out loss less the base model's) of a role; empty when that is not known."""
        if role not in self.base:
            return []
        return [(step, loss - self.base[role]) for step, loss in self.losses(role)]


def read_record(out: Path, manifest: Mapping[str, Any] | None = None) -> Record:
    """Read an output folder. `manifest` is that of a run which is complete but for writing it."""
    steps, evaluations = _read_metrics(out / "metrics.jsonl")
    given = manifest is not None
    manifest = _mapping(manifest) if given else _json(out / "manifest.json")
    if not given and len(steps) and _number(manifest.get("steps")) != steps.step[-1]:
        manifest = {}  # left by an earlier run of another job on this output
    config = _newest_json(out.glob("logs/*/config.json"))
    checkpoint = _newest_json(out.glob("checkpoints/step-*/manifest.json"))
    prepared_directory = _prepared(out, manifest, config)
    prepared = _json(prepared_directory / "prepared.json")
    bases = _json(prepared_directory / "base-losses.json")
    waited = np.nansum(steps.seconds) + np.nansum(steps.data_wait)
    seconds = _number(manifest.get("trainingSeconds"))
    return Record(
        state="Complete" if manifest else _state(out / ".lock"),
        name=str(manifest.get("jobName") or config.get("name") or out.absolute().name),
        model=str(_mapping(manifest.get("parentModel") or config.get("model")).get("uri", "")),
        completed=str(manifest.get("completionTime", "")),
        step=int(steps.step[-1]) if len(steps) else _count(manifest.get("steps")) or 0,
        tokens=int(np.nansum(steps.tokens)) if len(steps) else _count(manifest.get("tokens")) or 0,
        total_steps=_count(manifest.get("totalSteps", prepared.get("totalSteps"))),
        processes=_count(manifest.get("processes")),
        training_seconds=float(waited) if math.isnan(seconds) else seconds,
        evaluation_seconds=_known(manifest.get("evaluationSeconds")),
        settings=_settings(manifest, config, checkpoint),
        software=_mapping(manifest.get("software") or checkpoint.get("software")),
        notes=_notes(manifest, prepared),
        sources=_sources(manifest, prepared, steps),
        split_percent=_split_percent(manifest, config),
        base=_base_losses(manifest) or _numbers(bases.get("byRole")),
        base_by_source=_numbers(bases.get("bySource")),
        steps=steps,
        evaluations=evaluations or _last_evaluation(manifest),
    )


# --- metrics --------------------------------------------------------------------------------------

_COLUMNS = {
    "step": "step",
    "loss": "loss",
    "learning_rate": "learningRate",
    "grad_norm": "gradNorm",
    "tokens": "tokens",
    "tokens_per_second": "tokensPerSecond",
    "seconds": "seconds",
    "data_wait": "dataWait",
    "padding": "padding",
    "mfu": "mfu",
}


def _read_metrics(path: Path) -> tuple[Steps, tuple[Evaluation, ...]]:
    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    skipped: list[bool] = []
    by_source: dict[str, dict[int, float]] = {}
    evaluations = []
    for line in read_metrics(path):
        if "evaluation" in line:
            evaluations.append(Evaluation(line["step"], _numbers(line["evaluation"])))
            continue
        for source, tokens in _numbers(line.get("tokensBySource")).items():
            by_source.setdefault(source, {})[len(skipped)] = tokens
        for name, key in _COLUMNS.items():
            columns[name].append(_number(line.get(key)))
        skipped.append(bool(line.get("skipped", False)))
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    trained = {}
    for source, found in by_source.items():
        trained[source] = np.zeros(len(skipped))
        trained[source][list(found)] = list(found.values())
    steps = Steps(**arrays, skipped=np.array(skipped, dtype=np.bool_), by_source=trained)
    return steps, tuple(evaluations)


# --- the other files ------------------------------------------------------------------------------


def _state(lock: Path) -> State:
    """Whether a live process holds the output; a cluster has no lock file, so nothing is known."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "Running"
    except OSError:
        return "Not complete"
    return "Stopped"


def _prepared(out: Path, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Directory of the prepared data: the one the manifest names, else the newest."""
    parents = [out / "prepared"]
    elsewhere = _mapping(config.get("paths")).get("prepared")
    if isinstance(elsewhere, str):
        parents.append(Path(elsewhere))
    digest = _mapping(manifest.get("data")).get("prepared")
    pattern = f"{digest}/prepared.json" if _is_hex(digest) else "*/prepared.json"
    for parent in parents:
        found = _by_age(parent.glob(pattern))
        if found:
            return found[-1].parent
    return out / "prepared"


def _base_losses(manifest: Mapping[str, Any]) -> dict[str, float]:
    metrics = _numbers(manifest.get("metrics"))
    keys = {role: f"heldout_{role.lower()}_loss_base" for role in ROLES}
    return {role: metrics[key] for role, key in keys.items() if key in metrics}


def _last_evaluation(manifest: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """What the manifest tells of it, for an output whose metrics.jsonl is gone."""
    metrics = _numbers(manifest.get("metrics"))
    if not any(f"heldout_{role.lower()}_loss" in metrics for role in ROLES):
        return ()
    return (Evaluation(_count(manifest.get("steps")) or 0, metrics),)


def _notes(manifest: Mapping[str, Any], prepared: Mapping[str, Any]) -> tuple[str, ...]:
    """What a person should know: losses that are no numbers, and what preparing warned of."""
    unknown = _mapping(manifest.get("notFinite"))
    warnings = [str(note) for note in _list(prepared.get("warnings"))]
    return (*(f"{name}: {reason}" for name, reason in unknown.items()), *warnings)


def _settings(
    manifest: Mapping[str, Any], config: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    given = manifest.get("settings") or config.get("training")
    if given:
        return _mapping(given)
    lineage, start = _mapping(checkpoint.get("lineage")), "training."
    return {key[len(start) :]: lineage[key] for key in lineage if key.startswith(start)}


def _split_percent(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    told = _known(_mapping(manifest.get("data")).get("splitPercent"))
    return told or _known(_mapping(config.get("validation")).get("splitPercent")) or 0.0


def _sources(
    manifest: Mapping[str, Any], prepared: Mapping[str, Any], steps: Steps
) -> tuple[SourceRecord, ...]:
    """Sources of the manifest or of the prepared data, then those that only the metrics name."""
    entries = _list(_mapping(manifest.get("data")).get("sources"))
    asked = _asked_shares(entries) or _asked_shares(_list(prepared.get("sources")))
    trained = {name: int(column.sum()) for name, column in steps.by_source.items()}
    if not len(steps):
        said = _numbers(manifest.get("tokensBySource"))
        trained = {name: int(tokens) for name, tokens in said.items()}
    known = {
        str(entry.get("name")): entry
        for entry in (_mapping(entry) for entry in entries or _list(prepared.get("sources")))
    }
    return tuple(
        SourceRecord(
            name=name,
            role=str(entry.get("role", "")),
            documents=_count(entry.get("documents")),
            tokens=_count(entry.get("tokens")),
            rows=_count(entry.get("rows")),
            asked_share=asked.get(name),
            trained_tokens=trained.get(name, 0),
        )
        for name, entry in (known | {name: {} for name in trained if name not in known}).items()
    )


def _asked_shares(sources: Iterable[object]) -> dict[str, float]:
    """The share of the mix that was asked for each source; empty where that is not told."""
    entries = [_mapping(source) for source in sources]
    given = [
        Share(
            str(entry.get("name")),
            entry.get("role") == "General",
            _count(entry.get("rows")) or 0,
            _known(entry["weight"]),
        )
        for entry in entries
        if "weight" in entry
    ]
    try:
        return dict(zip((share.name for share in given), shares.asked(given), strict=True))
    except (ConfigError, ArithmeticError, KeyError):
        return {}


# --- values as they are found ---------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is none."""
    try:
        return _mapping(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _newest_json(paths: Iterable[Path]) -> dict[str, Any]:
    found = _by_age(paths)
    return _json(found[-1]) if found else {}


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Oldest first. A running job removes checkpoints, so a path may be gone by now."""
    ages = []
    for path in paths:
        try:
            ages.append((path.stat().st_mtime_ns, path))
        except OSError:
            continue
    return [path for _, path in sorted(ages)]


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and value.isalnum()


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _number(value: object) -> float:
    """A finite number, else NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _known(value: object) -> float | None:
    number = _number(value)
    return None if math.isnan(number) else number


def _numbers(value: object) -> dict[str, float]:
    """The finite numbers of an object."""
    found = {str(key): _number(item) for key, item in _mapping(value).items()}
    return {key: number for key, number in found.items() if not math.isnan(number)}


def _count(value: object) -> int | None:
    number = _known(value)
    return None if number is None else int(number)
