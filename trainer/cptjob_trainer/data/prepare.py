"""From documents to everything that the trainer needs to know before its first step.

What it leaves: prepared.py. `python -m cptjob_trainer.data.prepare --config FILE` runs it by itself.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from cptjob_trainer import failpoints, lifeline, termination, unfinished
from cptjob_trainer.checkpoint import output_folder
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import advice, known_files, prepared, request, shares, tables, tokenizer
from cptjob_trainer.data.corpus import VALIDATE, Corpus, Given
from cptjob_trainer.data.known_files import KnownFiles
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.data.rows import Layout
from cptjob_trainer.data.shares import Share
from cptjob_trainer.data.tables import Part
from cptjob_trainer.data.tokenizer import TokenizerInfo
from cptjob_trainer.data.tokens import Options
from cptjob_trainer.disk import is_full
from cptjob_trainer.errors import (
    ConfigError,
    CPTJobError,
    DataError,
    Fault,
    OutputError,
    StorageFullError,
)
from cptjob_trainer.model import modeldir, packing, presets
from cptjob_trainer.model.modeldir import ModelInfo
from cptjob_trainer.words import counted

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """What `check` found: documents and lines by data set, and the lines that will be skipped."""

    model: ModelInfo
    documents: dict[str, int]
    bad_line_count: int
    bad_lines: tuple[Fault, ...]


def check(
    config: TrainerConfig,
    report: Report = lambda what, done, total: None,
    *,
    stop: Callable[[], bool] = lambda: False,
    processes: int | None = None,
    weights: bool = False,
) -> Checked:
    """Check model, tokenizer and data as `prepare` does, without writing anything.

    weights: look also whether they are those of the model's configuration, which imports torch.
    """
    model = _checked_model(config)
    with tempfile.TemporaryDirectory(prefix="cptjob-check-") as scratch:
        _prompt(config, tokenizer.load(model.path, Path(scratch)), model, [])
    corpus = Corpus(config)
    reading = lambda done, total: report("Validating", done, total)  # noqa: E731
    with packing.Trial(model.path) if weights else nullcontext() as trial:
        corpus.read(VALIDATE, reading, stop=stop, processes=processes)
        if trial is not None:
            trial.result()
    return Checked(
        model=model,
        documents={given.dataset.name: given.documents for given in corpus.given},
        bad_line_count=corpus.faults.bad_lines,
        bad_lines=tuple(corpus.faults.lines),
    )


def prepare(
    config: TrainerConfig,
    report: Report = lambda what, done, total: None,
    *,
    stop: Callable[[], bool] = lambda: False,
    processes: int | None = None,
    packs: Callable[[Path], bool] | None = None,
) -> Prepared:
    """Check the model, validate and tokenise the data, lay out rows, count steps.

    `report(what, done, total)` is called with bytes as they are finished. Once `stop` returns True,
    Stopped is raised; a later call goes on from what is finished. `packs(model_dir)` says whether
    documents may share a row; by default the architecture is tried (isolation.packs). What was
    prepared before is found again and returned at once.
    """
    output_folder.check(config)
    model = _checked_model(config)
    corpus = Corpus(config)
    # Before the data is read: what changes meanwhile is then not taken for what was prepared.
    wanted = request.digest(config)
    into = config.paths.prepared
    with _writing(into):
        into.mkdir(parents=True, exist_ok=True)
        unfinished.remove_leftovers(into)
        info = tokenizer.load(model.path, into / "tokenizers")
    warnings: list[str] = []
    prompt = _prompt(config, info, model, warnings)
    options = Options(into / "shards", info, config.data.normalize)
    known = KnownFiles(into, options.digest())
    reading = lambda done, total: report("Tokenising", done, total)  # noqa: E731
    with packing.trial(model, into, _write_json, packs) as packed:
        corpus.read(options, reading, stop=stop, processes=processes, known=known)
        if (files := known.changed()) is not None:
            _write_json(into / known_files.FILE, files)
        _check_ids(corpus, model, info)
        layout = Layout(config.training.max_length, packed(), prompt, info.bos_id is not None)
    made = _Made(config, corpus, model, info, layout, wanted, tuple(warnings))
    found = _published(made, report, stop)
    return replace(found, warnings=(*found.warnings, *advice.of_run(config, found.total_steps)))


# -- what is decided before rows are laid out ------------------------------------------------------


def _checked_model(config: TrainerConfig) -> ModelInfo:
    if config.task != "CausalLM":
        raise ConfigError(f"task: {config.task} cannot be prepared yet; use CausalLM")
    if config.data.deduplicate != "None":
        raise ConfigError(
            f"data.deduplicate: {config.data.deduplicate} is not supported yet; leave it out"
        )
    model = modeldir.check_model(config.model.path)
    length, positions = config.training.max_length, model.max_positions
    if positions is not None and length > positions and config.training.rope_scaling is None:
        raise ConfigError(
            f"training.maxLength: {length} is above the model's {positions} positions; set it "
            f"to at most {positions}"
        )
    return model


def _prompt(
    config: TrainerConfig, info: TokenizerInfo, model: ModelInfo, warn: list[str]
) -> tuple[int, ...]:
    prompt = config.training.system_prompt
    if prompt is None:
        return ()
    ids = tokenizer.prompt_ids(info, model.path, prompt, warn)
    if ids and model.vocab_size is not None and max(ids) >= model.vocab_size:
        raise DataError(
            f"{model.path}: the system prompt holds token {max(ids)}, and the model's vocabulary has "
            f"{model.vocab_size}; copy chat template and tokenizer that belong to the model"
        )
    # Says early that a prompt is too long.
    Layout(config.training.max_length, True, ids, info.bos_id is not None)
    return ids


def _check_ids(corpus: Corpus, model: ModelInfo, info: TokenizerInfo) -> None:
    highest = max(shard.highest_id for given in corpus.given for shard in given.shards)
    if model.vocab_size is not None and highest >= model.vocab_size:
        raise DataError(
            f"{info.path}: gives token {highest}, and the model's vocabulary has "
            f"{model.vocab_size}; copy the tokenizer that belongs to the model"
        )


@dataclass(frozen=True)
class _Made:
    """All that decides rows and steps. `wanted` is the digest of what was asked for."""

    config: TrainerConfig
    corpus: Corpus
    model: ModelInfo
    info: TokenizerInfo
    layout: Layout
    wanted: str
    warnings: tuple[str, ...]


def _fingerprints(made: _Made) -> tuple[str, str]:
    """(the data, its layout and its shares; that and all else that prepared.json says)."""
    config, layout = made.config, made.layout
    data = _digest(
        prepared.VERSION,
        [
            [given.dataset.name, given.dataset.role, given.held_out, given.dataset.weight]
            + [shard.key for shard in given.shards]
            for given in made.corpus.given
        ],
        made.info.fingerprint,
        [layout.max_length, layout.packed, layout.prompt, layout.bos],
        config.validation.split_percent,
        config.data.max_bad_lines > 0,
    )
    return data, _digest(
        data,
        made.model.fingerprint,
        config.training.epochs,
        config.training.max_steps,
        config.training.global_batch_size,
    )


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# -- rows ------------------------------------------------------------------------------------------


def _published(made: _Made, report: Report, stop: Callable[[], bool]) -> Prepared:
    data, whole = _fingerprints(made)
    into = made.config.paths.prepared
    directory = into / whole
    found = prepared.found_whole(directory)
    if found is not None:
        return found
    temporary = unfinished.path_in(into)
    try:
        with _writing(into):
            sources, heldout = _lay_out(temporary, made, report, stop)
            value = _described(made, sources, heldout) | {
                "digest": whole,
                "dataFingerprint": data,
            }
            _write_json(temporary / prepared.FILE, value)
            failpoints.hit("prepare.publish")
            prepared.publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return prepared.load_prepared(directory)


def _lay_out(
    directory: Path, made: _Made, report: Report, stop: Callable[[], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the tables of all data sets; what prepared.json says of sources and held-out data."""
    corpus, shards = made.corpus, made.config.paths.prepared / "shards"
    total = sum(given.documents for given in corpus.given)
    done = 0
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, given in enumerate(corpus.given):
        report("Laying out rows", done, total)
        limit = _held_out_below(made, given)
        pair = tables.write(directory, number, given.shards, shards, limit, made.layout, stop)
        if pair[0] is None and not given.held_out:
            raise _all_held_out(given, made.config.validation.split_percent)
        for entries, part in zip(parts, pair, strict=True):
            if part is not None:
                entries.append(_entry(given, part))
        done += given.documents
    report("Laying out rows", total, total)
    return parts


def _held_out_below(made: _Made, given: Given) -> int:
    """Documents with a hash below this are held out. Validation data of a role takes the place of
    a part of the training data of that role.
    """
    if given.held_out:
        return tables.ALL
    if given.dataset.role in {each.dataset.role for each in made.corpus.given if each.held_out}:
        return 0
    return tables.border(given.shards, made.config.validation.split_percent)


def _all_held_out(given: Given, percent: float) -> DataError:
    return DataError(
        f"{given.dataset.path}: all data of {given.dataset.name} is held out: its "
        f"{counted(given.documents, 'document falls', 'documents fall')} into the {percent:g} % or "
        "are all the same; add "
        "documents, lower validation.splitPercent (0 holds nothing out) or give "
        "validation.datasets"
    )


def _entry(given: Given, part: Part) -> dict[str, Any]:
    return {
        "name": given.dataset.name,
        "role": given.dataset.role,
        "weight": given.dataset.weight,
        **asdict(part),
        "shards": [shard.key for shard in given.shards],
    }


def _pad_id(made: _Made) -> int:
    """An added padding token often lies beyond the vocabulary; it is never a target, so any will do."""
    size = made.model.vocab_size
    return made.info.pad_id if size is None or made.info.pad_id < size else made.info.eos_id


def _described(
    made: _Made, sources: list[dict[str, Any]], heldout: list[dict[str, Any]]
) -> dict[str, Any]:
    """What prepared.json says, but for the fingerprints."""
    training, faults = made.config.training, made.corpus.faults
    given = [
        Share(entry["name"], entry["role"] == "General", entry["rows"], entry["weight"])
        for entry in sources
    ]
    quotas = dict(
        zip((share.name for share in given), shares.quotas(given, training.epochs), strict=True)
    )
    total = sum(quotas.values())
    steps = shares.steps(total, training.global_batch_size, training.max_steps)
    counts = _counts(made, sources, heldout, quotas, steps)
    return {
        "version": prepared.VERSION,
        "request": made.wanted,
        "modelFingerprint": made.model.fingerprint,
        "packed": made.layout.packed,
        "maxLength": made.layout.max_length,
        "promptIds": list(made.layout.prompt),
        "bos": made.layout.bos,
        "padId": _pad_id(made),
        "vocabSize": made.model.vocab_size or made.info.size,
        "dtype": made.info.dtype,
        "quotas": list(quotas.values()),
        "totalRows": total,
        "totalSteps": steps,
        "sources": sources,
        "heldout": heldout,
        "warnings": [*made.warnings, *advice.warnings(counts)],
        "badLineCount": faults.bad_lines,
        "badLines": [astuple(fault) for fault in faults.lines],
    }


def _counts(
    made: _Made,
    sources: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    quotas: dict[str, int],
    steps: int,
) -> advice.Counts:
    training = made.config.training
    rows = sum(quotas.values())
    drawn = shares.drawn(rows, training.global_batch_size, steps) / rows
    roles, measured = ({entry["role"] for entry in entries} for entries in (sources, heldout))
    return advice.Counts(
        packed=made.layout.packed,
        rows=rows,
        batch=training.global_batch_size,
        steps=steps,
        never_drawn=tuple(name for name, quota in quotas.items() if quota == 0),
        seen={entry["name"]: drawn * quotas[entry["name"]] / entry["rows"] for entry in sources},
        domain_tokens=sum(entry["tokens"] for entry in sources if entry["role"] == "Domain"),
        unmeasured=tuple(sorted(roles - measured)),
        split_percent=made.config.validation.split_percent,
        bad_lines=made.corpus.faults.bad_lines,
    )


# -- writing ---------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk."""
    temporary = unfinished.path_in(path.parent)
    with _writing(path.parent):
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns faults of writing into ours."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFullError(
                f"{directory}: no space left for the prepared data; make room and run again"
            ) from error
        raise OutputError(
            f"{directory}: the prepared data cannot be written: {error.strerror}; check the "
            "output's path and permissions"
        ) from error


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare or check from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cptjob_trainer.data.prepare", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a TrainerConfig as JSON")
    parser.add_argument(
        "--check-only", action="store_true", help="check model and data, write nothing"
    )
    options = parser.parse_args(arguments)
    try:
        with _stoppable() as stop:
            config = presets.load(options.config)
            if options.check_only:
                done = check(config, _print_progress, stop=stop, weights=True)
                print(_summary_of_check(done))
            else:
                print(_summary(prepare(config, _print_progress, stop=stop)))
    except CPTJobError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    return 0


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Whether to stop: after Ctrl-C, SIGTERM, or the end of the process that started this one."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda number, _: asked.append(number)) for each in numbers}
    try:
        if not lifeline.follow_parent(signal.SIGTERM):
            asked.append(signal.SIGTERM)
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what} {100 * done // max(total, 1)} %", end=end, file=sys.stderr, flush=True)


def _summary(made: Prepared) -> str:
    lines = [
        f"{source.role} {source.name}: {counted(source.documents, 'document')}, "
        f"{counted(source.tokens, 'token')}, {counted(source.rows(), 'row')}, {quota} drawn"
        for source, quota in zip(made.sources, made.quotas, strict=True)
    ]
    lines += [
        f"held out from {source.name}: {counted(source.documents, 'document')}, "
        f"{counted(source.tokens, 'token')}"
        for source in made.heldout
    ]
    lines += [f"warning: {warning}" for warning in made.warnings]
    lines += [f"skipped: {fault}" for fault in made.bad_lines[:20]]
    rows, steps = counted(made.total_rows, "row"), counted(made.total_steps, "step")
    lines.append(f"{rows}, {steps}, in {made.directory}")
    return "\n".join(lines)


def _summary_of_check(checked: Checked) -> str:
    lines = [f"model: {checked.model.architecture}, {checked.model.parameters} parameters"]
    lines += [f"{name}: {counted(count, 'document')}" for name, count in checked.documents.items()]
    lines += [f"would be skipped: {fault}" for fault in checked.bad_lines[:20]]
    return "\n".join(lines)


if __name__ == "__main__":
    with termination.guard():
        sys.exit(main())
