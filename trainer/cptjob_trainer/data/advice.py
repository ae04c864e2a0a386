"""What is worth a warning in a job's data, and why a held-out loss is missing.

Each rule gives one sentence or none. No torch.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cptjob_trainer.config import DatasetInput, ResolvedLora, TrainerConfig
from cptjob_trainer.data import request
from cptjob_trainer.model import safetensors_header
from cptjob_trainer.words import counted

# Below so many domain tokens, a text that is seen more than once is learnt by heart.
_LITTLE_DATA = 100_000
# Up to four times, seeing a text again teaches about as much as new text would (Muennighoff et al.,
# Scaling Data-Constrained Language Models, arXiv 2305.16264); then less and less.
_OFTEN = 4.0


@dataclass(frozen=True)
class Counts:
    """What the rules look at. `rows` are drawn in all, `batch` of them a step. `never_drawn` are
    the data sets of which no row is, `unmeasured` the roles of which nothing is held out although
    `split_percent` is asked. `seen`: how many times each data set is trained on in all steps.
    """

    packed: bool
    rows: int
    batch: int
    steps: int
    never_drawn: tuple[str, ...]
    seen: Mapping[str, float]
    domain_tokens: int
    unmeasured: tuple[str, ...]
    split_percent: float
    bad_lines: int


def warnings(counts: Counts) -> list[str]:
    """What the rules have to say, in their order."""
    said = (rule(counts) for rule in _RULES)
    return [sentence for sentence in said if sentence is not None]


def _rows_of_one_document(counts: Counts) -> str | None:
    if counts.packed:
        return None
    return (
        "this architecture mixes documents that share a row, so each row holds one document; "
        "short documents waste compute"
    )


def _half_empty_last_step(counts: Counts) -> str | None:
    empty = counts.steps * counts.batch - counts.rows
    few = "is only" if counts.steps == 1 else "are only"
    if empty <= counts.steps * counts.batch / 10:
        return None
    return (
        f"training.globalBatchSize: the last step has {counted(counts.batch - empty, 'row')} of "
        f"{counts.batch}, and there {few} {counted(counts.steps, 'step')}; a smaller batch wastes less"
    )


def _never_drawn(counts: Counts) -> str | None:
    if not counts.never_drawn:
        return None
    return (
        f"datasets: the share of {', '.join(counts.never_drawn)} is less than one row, so nothing "
        "of it is trained on; raise its weight or the epochs, or remove it"
    )


def _seen_often(counts: Counts) -> str | None:
    little = counts.domain_tokens < _LITTLE_DATA
    often = {
        name: times for name, times in counts.seen.items() if times > (1 if little else _OFTEN)
    }
    if not often:
        return None
    told = ", ".join(f"{name} is seen {times:.3g} times" for name, times in often.items())
    why = (
        f"the domain text has only {counted(counts.domain_tokens, 'token')}, so that it may be "
        "learnt by heart"
        if little
        else "beyond about four times a text teaches little more and may be learnt by heart"
    )
    return f"datasets: {told}; {why}; watch the held-out loss"


def _nothing_held_out(counts: Counts) -> str | None:
    if not counts.unmeasured:
        return None
    shown = {"Domain": "what is learnt and over-fitting", "General": "forgetting"}
    roles = " and ".join(counts.unmeasured)
    return (
        f"validation: nothing is held out of the {roles} text, so "
        f"{' and '.join(shown[role] for role in counts.unmeasured)} will not be measured; "
        f"{_hold_out(roles, counts.split_percent)}"
    )


def _hold_out(roles: str, percent: float) -> str:
    """A split takes a document at least, where there are two."""
    if percent > 0:
        return f"of one document none can be spared: add some, or give {_VALIDATION} {roles}"
    return f"set validation.splitPercent above 0, or give {_VALIDATION} {roles}"


_VALIDATION = "validation.datasets of role"


def why_not_measured(role: str, trained: Collection[str], percent: float) -> str:
    """Why a complete run has no held-out loss of `role`. `trained`: the roles of its data, of which
    `percent` were to be held out.
    """
    if role not in trained:
        return f"the job has no {role} data"
    return f"nothing of it is held out: {_hold_out(role, percent)}"


def _bad_lines(counts: Counts) -> str | None:
    if not counts.bad_lines:
        return None
    return f"data: {counted(counts.bad_lines, 'bad line was', 'bad lines were')} skipped"


def of_run(config: TrainerConfig, steps: int) -> list[str]:
    """What is worth a warning in how the data is trained on: no part of what is prepared."""
    training = config.training
    return [
        *same_data(config.datasets, config.validation.datasets),
        *unmatched_targets(training.lora, config.model.path),
        *uneven_batch(training.global_batch_size, config.processes.world_size),
        *long_warmup(training.schedule.warmup_steps, steps),
    ]


def same_data(datasets: Iterable[DatasetInput], held_out: Iterable[DatasetInput]) -> Iterator[str]:
    """Files that are in two data sets at once, by the names of those."""
    trained = [(f"datasets[{each.name}]", _files(each)) for each in datasets]
    for (name, files), (other, others) in itertools.combinations(trained, 2):
        if files & others:
            yield f"{other}: has the same data as {name}, which so is trained on twice; remove one"
    for each in held_out:
        for name, files in trained:
            if files & _files(each):
                yield (
                    f"validation.datasets[{each.name}]: has the same data as {name}, so that its "
                    "loss tells how well that is learnt by heart; give other data, or leave it out "
                    "to hold a part of the data out"
                )


def _files(dataset: DatasetInput) -> set[Path]:
    return {file.resolve() for file in request.files(dataset.path)}


def unmatched_targets(lora: ResolvedLora | None, model: Path) -> list[str]:
    """Names of layers to adapt that no weight of the model has."""
    if lora is None or lora.target_modules == ("all-linear",):
        return []
    layers = _layers(model)
    unknown = [
        name for name in lora.target_modules if not any(_ends(each, name) for each in layers)
    ]
    if not unknown or not layers:
        return []
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    return [
        f"training.lora.targetModules: no layer of the model is named {', '.join(unknown)}; it has "
        f"{', '.join(known)}"
    ]


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _layers(model: Path) -> list[str]:
    """The names of matrices, as far as the files can be read: others say what is wrong with them."""
    names = []
    for path in sorted(model.glob("*.safetensors")):
        with suppress(OSError, ValueError), path.open("rb") as file:
            tensors = safetensors_header.read(file).tensors
            names += [each.name for each in tensors if len(each.shape) == 2]
    return [name.removesuffix(".weight") for name in names]


def uneven_batch(batch: int, processes: int) -> list[str]:
    """Rows that only fill up the processes."""
    empty = -batch % processes
    if not empty:
        return []
    return [
        f"training.globalBatchSize: {batch} is no multiple of the {processes} processes, so that "
        f"each step computes {counted(empty, 'empty row')} besides; take a multiple"
    ]


def long_warmup(warmup: int | None, steps: int) -> list[str]:
    """A warm-up that the job ends in."""
    if warmup is None or warmup <= steps:
        return []
    return [
        f"training.schedule.warmupSteps: {warmup} is more than the job's "
        f"{counted(steps, 'step')}, so the learning rate never reaches its peak; lower it, or "
        "leave it out for 1 % of the steps"
    ]


_RULES = (
    _rows_of_one_document,
    _half_empty_last_step,
    _never_drawn,
    _seen_often,
    _nothing_held_out,
    _bad_lines,
)
