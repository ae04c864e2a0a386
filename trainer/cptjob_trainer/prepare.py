"""From documents to everything that the trainer needs to know before its first step.

    <prepared>/shards/<key>/             token shards, see tokens.py
    <prepared>/<digest>/train/<n>/       tables of each training source, see rows.py
    <prepared>/<digest>/heldout/<n>/     tables of each held-out source
    <prepared>/<digest>/prepared.json    counts, quotas, fingerprints

The directory of a digest appears whole or not at all, and a later preparation with other data or
settings leaves it alone. `python -m cptjob_trainer.prepare --config FILE` runs it by itself.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np

from cptjob_trainer import (
    documents,
    failpoints,
    lifeline,
    modeldir,
    request,
    shares,
    tokenizer,
    tokens,
    unfinished,
)
from cptjob_trainer.config import DatasetInput, TrainerConfig
from cptjob_trainer.documents import Chunk
from cptjob_trainer.errors import (
    ConfigError,
    CPTJobError,
    DataError,
    Fault,
    OutputError,
    Stopped,
    StorageFullError,
)
from cptjob_trainer.mix import Mix
from cptjob_trainer.modeldir import ModelInfo
from cptjob_trainer.rows import DOCUMENT_COLUMNS, ROW_COLUMNS, Layout, Source, Table
from cptjob_trainer.shares import Share
from cptjob_trainer.tokenizer import TokenizerInfo
from cptjob_trainer.tokens import Options, Shard

VERSION = 1

Report = Callable[[str, int, int], None]

# Documents that are looked at in one go while tables are built: some MB of arrays.
_PART = 1 << 18

# Faults and skipped lines that are kept; beyond that they are counted.
_KEPT_FAULTS = 200

# Below so many domain tokens, a run of several epochs learns by heart.
_LITTLE_DATA = 100_000


@dataclass(frozen=True)
class Prepared:
    """What the trainer reads. `data_fingerprint` tells documents, how they are cut into rows and
    their shares; `digest` all that decides rows and steps, and the model. `quotas[s]` rows of
    `sources[s]` are drawn in all.
    """

    directory: Path
    digest: str
    model_fingerprint: str
    data_fingerprint: str
    packed: bool
    max_length: int
    prompt_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    sources: tuple[Source, ...]
    heldout: tuple[Source, ...]
    quotas: tuple[int, ...]
    total_rows: int
    total_steps: int
    warnings: tuple[str, ...]
    bad_line_count: int = 0
    bad_lines: tuple[Fault, ...] = field(default=(), repr=False)

    def mix(self, seed: int) -> Mix:
        """The order of the training rows."""
        return Mix([source.rows() for source in self.sources], self.quotas, seed)


@dataclass(frozen=True)
class Checked:
    """What `check` found: documents and lines by data set, and the lines that will be skipped."""

    model: ModelInfo
    documents: dict[str, int]
    bad_line_count: int
    bad_lines: tuple[Fault, ...]


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
    documents may share a row; by default the architecture is tried (attention.packs). What was
    prepared before is found again and returned at once.
    """
    return _Preparation(config, report, stop, processes, packs).run()


def check(
    config: TrainerConfig,
    report: Report = lambda what, done, total: None,
    *,
    stop: Callable[[], bool] = lambda: False,
    processes: int | None = None,
) -> Checked:
    """Check model and data as `prepare` does, without writing anything."""
    return _Preparation(config, report, stop, processes, None).check()


# --- the work --------------------------------------------------------------------------------------


@dataclass
class _Input:
    """A data set while it is prepared. `held_out` data is not trained on."""

    dataset: DatasetInput
    held_out: bool
    chunks: list[Chunk] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass
class _Faults:
    """Faults in the order of the files; those of files as a whole are never tolerated."""

    limit: int
    files: list[Fault] = field(default_factory=list)
    lines: list[Fault] = field(default_factory=list)
    bad_lines: int = 0

    @property
    def too_many(self) -> bool:
        return bool(self.files) or self.bad_lines > self.limit

    def add(self, path: Path, first_line: int, shard: Shard) -> None:
        self.bad_lines += shard.bad_lines
        for line, message in shard.faults[: max(0, _KEPT_FAULTS - len(self.lines))]:
            self.lines.append(Fault(str(path), first_line + line, message))

    def error(self) -> DataError:
        shown = [*self.files, *self.lines]
        count = len(self.files) + self.bad_lines
        allowed = f" ({self.limit} bad lines are allowed)" if self.limit and self.bad_lines else ""
        noun = "fault" if count == 1 else "faults"
        return DataError(f"the data has {count} {noun}{allowed}:", shown, more=count - len(shown))


class _Preparation:
    def __init__(
        self,
        config: TrainerConfig,
        report: Report,
        stop: Callable[[], bool],
        processes: int | None,
        packs: Callable[[Path], bool] | None,
    ) -> None:
        self.config, self.report, self.stop, self.processes = config, report, stop, processes
        self.packs = packs
        self.prepared = config.paths.prepared
        self.shards = self.prepared / "shards"
        self.faults = _Faults(config.data.max_bad_lines)
        self.warnings: list[str] = []

    def check(self) -> Checked:
        model = self._check_model()
        inputs = self._inputs()
        self._process(inputs, Options(None, None), "Validating")
        self._raise_faults(inputs)
        return Checked(
            model=model,
            documents={given.dataset.name: given.documents for given in inputs},
            bad_line_count=self.faults.bad_lines,
            bad_lines=tuple(self.faults.lines),
        )

    def run(self) -> Prepared:
        model = self._check_model()
        inputs = self._inputs()
        # Before the data is read: what changes meanwhile is then not taken for what was prepared.
        wanted = request.digest(self.config)
        with _writing(self.prepared):
            self.prepared.mkdir(parents=True, exist_ok=True)
            unfinished.remove_leftovers(self.prepared)
            info = tokenizer.load(model.path, self.prepared / "tokenizers")
        prompt = self._prompt(info, model)
        options = Options(self.shards, info, self.config.data.normalize)
        with self._trial(model) as packed:
            self._process(inputs, options, "Tokenising")
            self._raise_faults(inputs)
            self._check_ids(inputs, model, info)
            layout = self._layout(packed(), prompt, info)
        return self._published(inputs, model, info, layout, wanted)

    def _check_model(self) -> ModelInfo:
        config = self.config
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

    def _inputs(self) -> list[_Input]:
        config = self.config
        if not config.datasets:
            raise ConfigError("datasets: at least one is needed; add one with role Domain")
        inputs = [_Input(dataset, False) for dataset in config.datasets]
        inputs += [_Input(dataset, True) for dataset in config.validation.datasets]
        for given in inputs:
            for path in documents.files(given.dataset.path, self.faults.files):
                given.chunks.extend(documents.chunks(path))
        return inputs

    def _prompt(self, info: TokenizerInfo, model: ModelInfo) -> tuple[int, ...]:
        prompt = self.config.training.system_prompt
        if prompt is None:
            return ()
        ids = tokenizer.prompt_ids(info, model.path, prompt, self.warnings)
        # Says early that a prompt is too long.
        Layout(self.config.training.max_length, True, ids, info.bos_id is not None)
        return ids

    def _process(self, inputs: list[_Input], options: Options, what: str) -> None:
        """Fill in the shards of all inputs. Once it is clear that the data is refused, the rest is
        only validated: all faults are wanted, the tokens are not.
        """
        pairs = [(given, chunk) for given in inputs for chunk in given.chunks]
        total = sum(chunk.size for _, chunk in pairs)
        finished = 0

        def done(chunk: Chunk) -> None:
            nonlocal finished
            finished += chunk.size
            self.report(what, finished, total)

        self.report(what, 0, total)
        at = 0
        lines: dict[Path, int] = {}
        while at < len(pairs):
            tokenising = options.directory is not None and not self.faults.too_many
            chosen = options if tokenising else Options(None, None)
            finished = sum(chunk.size for _, chunk in pairs[:at])
            chunks = [chunk for _, chunk in pairs[at:]]
            for shard in tokens.process_all(chunks, chosen, done, self.processes, self.stop):
                if shard is None:
                    raise Stopped(
                        "stopped while preparing; run the same command to continue, what is "
                        "finished is kept"
                    )
                given, chunk = pairs[at]
                # Its faults go with those of all; each shard's would grow with the corpus.
                given.shards.append(replace(shard, faults=()))
                self.faults.add(chunk.path, lines.get(chunk.path, 0) + 1, shard)
                lines[chunk.path] = lines.get(chunk.path, 0) + shard.lines
                at += 1
                if tokenising and self.faults.too_many:
                    break

    def _raise_faults(self, inputs: list[_Input]) -> None:
        if self.faults.too_many:
            raise self.faults.error()
        for given in inputs:
            if given.documents == 0:
                raise DataError(
                    f"{given.dataset.path}: data set {given.dataset.name} has no usable document; "
                    "add documents or remove the data set",
                    self.faults.lines,
                    more=self.faults.bad_lines - len(self.faults.lines),
                )

    def _check_ids(self, inputs: list[_Input], model: ModelInfo, info: TokenizerInfo) -> None:
        highest = max(shard.highest_id for given in inputs for shard in given.shards)
        if model.vocab_size is not None and highest >= model.vocab_size:
            raise DataError(
                f"{info.path}: gives token {highest}, and the model's vocabulary has "
                f"{model.vocab_size}; copy the tokenizer that belongs to the model"
            )

    @contextmanager
    def _trial(self, model: ModelInfo) -> Iterator[Callable[[], bool]]:
        """Gives a function that says whether documents share rows; remembered per architecture.

        Trying an architecture imports torch and takes seconds: a process of its own does that while
        documents are tokenised, and is ended when these turn out to be broken.
        """
        parts = [json.dumps(model.config, sort_keys=True), metadata.version("transformers")]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        path = self.prepared / f"packs-{name}.json"
        try:
            known = bool(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            pass
        else:
            yield lambda: known
            return

        def remember(packed: bool) -> bool:
            with _writing(self.prepared):
                _write_json(path, packed)
            return packed

        packs = self.packs
        if packs is not None:
            yield lambda: remember(packs(model.path))
            return
        with _Trial(model.path) as trial:
            yield lambda: remember(trial.result())

    def _layout(self, packed: bool, prompt: tuple[int, ...], info: TokenizerInfo) -> Layout:
        if not packed:
            self.warnings.append(
                "this architecture mixes documents that share a row, so each row holds one "
                "document; short documents waste compute"
            )
        return Layout(
            max_length=self.config.training.max_length,
            packed=packed,
            prompt=prompt,
            bos=info.bos_id is not None,
        )

    # --- tables ---------------------------------------------------------------------------------------

    def _published(
        self,
        inputs: list[_Input],
        model: ModelInfo,
        info: TokenizerInfo,
        layout: Layout,
        wanted: str,
    ) -> Prepared:
        data, whole = self._fingerprints(inputs, model, info, layout)
        directory = self.prepared / whole
        if (directory / "prepared.json").is_file():
            try:
                return load_prepared(directory)
            except DataError:
                # Broken by somebody; everything in it can be made again.
                shutil.rmtree(directory, ignore_errors=True)
        temporary = unfinished.path_in(self.prepared)
        try:
            with _writing(self.prepared):
                self._write(temporary, inputs, model, info, layout, data, whole, wanted)
                failpoints.hit("prepare.publish")
                _publish(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return load_prepared(directory)

    def _fingerprints(
        self, inputs: list[_Input], model: ModelInfo, info: TokenizerInfo, layout: Layout
    ) -> tuple[str, str]:
        """(the data, its layout and its shares; that and all else that prepared.json says)."""
        training, validation = self.config.training, self.config.validation
        data = _digest(
            VERSION,
            [
                [given.dataset.name, given.dataset.role, given.held_out, given.dataset.weight]
                + [shard.key for shard in given.shards]
                for given in inputs
            ],
            info.fingerprint,
            [layout.max_length, layout.packed, layout.prompt, layout.bos],
            validation.split_percent,
            self.config.data.max_bad_lines > 0,
        )
        return data, _digest(
            data,
            model.fingerprint,
            training.epochs,
            training.max_steps,
            training.global_batch_size,
        )

    def _write(
        self,
        directory: Path,
        inputs: list[_Input],
        model: ModelInfo,
        info: TokenizerInfo,
        layout: Layout,
        data: str,
        whole: str,
        wanted: str,
    ) -> None:
        total = sum(given.documents for given in inputs)
        done = 0
        sources: list[dict[str, Any]] = []
        heldout: list[dict[str, Any]] = []
        given_roles = {given.dataset.role for given in inputs if given.held_out}
        for number, given in enumerate(inputs):
            self.report("Laying out rows", done, total)
            split = not given.held_out and given.dataset.role not in given_roles
            border = self._border(given) if split else (1 << 64 if given.held_out else 0)
            train, held = self._tables(directory, number, given, border, layout)
            if train is not None:
                sources.append(train)
            elif not given.held_out:
                raise self._all_held_out(given)
            if held is not None:
                heldout.append(held)
            done += given.documents
        self.report("Laying out rows", total, total)
        value = self._counts(sources) | {
            "version": VERSION,
            "digest": whole,
            "request": wanted,
            "modelFingerprint": model.fingerprint,
            "dataFingerprint": data,
            "packed": layout.packed,
            "maxLength": layout.max_length,
            "promptIds": list(layout.prompt),
            "bos": layout.bos,
            "padId": info.pad_id,
            "vocabSize": model.vocab_size or info.size,
            "dtype": info.dtype,
            "sources": sources,
            "heldout": heldout,
        }
        self._warn(value)
        value["warnings"] = self.warnings
        value["badLineCount"] = self.faults.bad_lines
        value["badLines"] = [[fault.file, fault.line, fault.message] for fault in self.faults.lines]
        _write_json(directory / "prepared.json", value)

    def _border(self, given: _Input) -> int:
        """Documents with a hash below this are held out; at least one, if there are two."""
        percent = self.config.validation.split_percent
        if percent == 0 or given.documents < 2:
            return 0
        lowest = min(shard.lowest_hash for shard in given.shards if shard.documents)
        return max(int(percent / 100 * 2**64), lowest + 1)

    def _all_held_out(self, given: _Input) -> DataError:
        return DataError(
            f"{given.dataset.path}: all data of {given.dataset.name} is held out: its "
            f"{given.documents} documents fall into the {self.config.validation.split_percent:g} % "
            "or are all the same; add documents, lower validation.splitPercent (0 holds nothing "
            "out) or give validation.datasets"
        )

    def _tables(
        self, directory: Path, number: int, given: _Input, border: int, layout: Layout
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Write the tables of both parts; a part without documents is None."""
        places = [f"train/{number}", f"heldout/{number}"]
        counts = [[0, 0], [0, 0]]
        for place in places:
            (directory / place).mkdir(parents=True)
        files = [(directory / place / "documents.bin").open("wb") for place in places]
        try:
            for shard_number, shard in enumerate(given.shards):
                offsets = shard.offsets(self.shards)
                hashes = shard.hashes(self.shards)
                # The border may be 2^64, which no unsigned number of 64 bits reaches.
                low = (
                    np.full(len(hashes), True)
                    if border > 2**64 - 1
                    else np.asarray(hashes < np.uint64(border))
                )
                table = np.stack(
                    [
                        np.full(len(hashes), shard_number, dtype=np.int64),
                        offsets[:-1],
                        np.diff(offsets),
                    ],
                    axis=1,
                )
                for part, chosen in enumerate((table[~low], table[low])):
                    counts[part][0] += len(chosen)
                    counts[part][1] += int(chosen[:, 2].sum())
                    files[part].write(np.ascontiguousarray(chosen).tobytes())
                if self.stop():
                    raise Stopped("stopped while preparing; run the same command to continue")
        finally:
            for file in files:
                file.close()
        parts: list[dict[str, Any] | None] = []
        for place, (found, size) in zip(places, counts, strict=True):
            if found == 0:
                shutil.rmtree(directory / place)
                parts.append(None)
                continue
            rows = _write_rows(directory / place, layout)
            parts.append(
                {
                    "name": given.dataset.name,
                    "role": given.dataset.role,
                    "weight": given.dataset.weight,
                    "documents": found,
                    "tokens": size,
                    "rows": rows,
                    "tables": place,
                    "shards": [shard.key for shard in given.shards],
                }
            )
        return parts[0], parts[1]

    def _counts(self, sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
        training = self.config.training
        quotas = shares.quotas(
            [
                Share(entry["name"], entry["role"] == "General", entry["rows"], entry["weight"])
                for entry in sources
            ],
            training.epochs,
        )
        total = sum(quotas)
        return {
            "quotas": list(quotas),
            "totalRows": total,
            "totalSteps": shares.steps(total, training.global_batch_size, training.max_steps),
        }

    def _warn(self, value: dict[str, Any]) -> None:
        training, batch = self.config.training, self.config.training.global_batch_size
        warn = self.warnings.append
        slots = -(-value["totalRows"] // batch) * batch
        if slots - value["totalRows"] > slots / 10:
            warn(
                f"training.globalBatchSize: the last step has {batch - slots + value['totalRows']} "
                f"rows of {batch}, and there are only {slots // batch} steps; a smaller batch "
                "wastes less"
            )
        domain = sum(entry["tokens"] for entry in value["sources"] if entry["role"] == "Domain")
        if domain < _LITTLE_DATA:
            warn(
                f"datasets: {domain} tokens of domain text are little to learn from, and "
                f"{training.epochs} epoch(s) of them may overfit; watch the held-out loss"
            )
        if not value["heldout"]:
            warn(
                "validation: nothing is held out, so nothing shows over-fitting or forgetting; set "
                "validation.splitPercent or validation.datasets"
            )
        if self.faults.bad_lines:
            warn(f"data: {self.faults.bad_lines} bad lines were skipped")


class _Trial:
    """attention.packs(model) in a process of its own."""

    _PROGRAM = (
        "import signal, sys; from cptjob_trainer import lifeline; "
        "lifeline.follow_parent(signal.SIGKILL) or sys.exit('its parent is gone'); "
        "from pathlib import Path; from cptjob_trainer import attention; "
        "print('packs', attention.packs(Path(sys.argv[1])))"
    )

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
        output, errors = self._process.communicate()
        word = output.split()[-2:]
        if self._process.returncode != 0 or word[:1] != ["packs"]:
            last = (errors.strip().splitlines() or ["it was killed"])[-1]
            raise CPTJobError(f"the model's architecture could not be tried: {last}")
        return word[1] == "True"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write_rows(directory: Path, layout: Layout) -> int:
    """Write the row table beside the document table; returns the number of rows."""
    table = np.memmap(directory / "documents.bin", np.int64, "r").reshape(-1, DOCUMENT_COLUMNS)

    def lengths() -> Iterator[Table]:
        for start in range(0, len(table), _PART):
            yield np.array(table[start : start + _PART, 2])

    count = 0
    with (directory / "rows.bin").open("wb") as file:
        for part in layout.row_starts(lengths()):
            file.write(np.ascontiguousarray(part, dtype=np.int64).tobytes())
            count += len(part)
    return count


def _publish(temporary: Path, directory: Path) -> None:
    """Give a finished directory its name. Another pod may have made the same one in the meantime
    and read it already, so that one stays if it is whole.
    """
    try:
        temporary.rename(directory)
    except OSError:
        try:
            load_prepared(directory)
        except DataError:
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk."""
    temporary = unfinished.path_in(path.parent)
    with temporary.open("x", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class _writing:
    """Turns faults of writing into ours."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"{self.directory}: no space left for the prepared data; make room and run again"
            ) from error
        raise OutputError(
            f"{self.directory}: the prepared data cannot be written: {error.strerror}; check the "
            "output's path and permissions"
        ) from error


# --- reading it back -------------------------------------------------------------------------------


def load_prepared(directory: Path) -> Prepared:
    """Read what `prepare` made. Raises DataError when something is missing or of the wrong size."""
    path = directory / "prepared.json"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(path, "cannot be read") from error
    if value.get("version") != VERSION:
        raise _broken(path, f"is of version {value.get('version')}, not {VERSION}")
    try:
        layout = Layout(
            value["maxLength"], value["packed"], tuple(value["promptIds"]), value["bos"]
        )
        shards = directory.parent / "shards"

        def sources(entries: list[dict[str, Any]]) -> tuple[Source, ...]:
            return tuple(
                _source(entry, directory, shards, layout, value["dtype"]) for entry in entries
            )

        return Prepared(
            directory=directory,
            digest=value["digest"],
            model_fingerprint=value["modelFingerprint"],
            data_fingerprint=value["dataFingerprint"],
            packed=value["packed"],
            max_length=value["maxLength"],
            prompt_ids=tuple(value["promptIds"]),
            pad_id=value["padId"],
            vocab_size=value["vocabSize"],
            sources=sources(value["sources"]),
            heldout=sources(value["heldout"]),
            quotas=tuple(value["quotas"]),
            total_rows=value["totalRows"],
            total_steps=value["totalSteps"],
            warnings=tuple(value["warnings"]),
            bad_line_count=value["badLineCount"],
            bad_lines=tuple(Fault(*fault) for fault in value["badLines"]),
        )
    except (KeyError, TypeError) as error:
        raise _broken(path, "lacks an entry") from error


def _source(
    entry: dict[str, Any], directory: Path, shards: Path, layout: Layout, dtype: str
) -> Source:
    tables = directory / entry["tables"]
    item = np.dtype(np.int64).itemsize
    _check_size(tables / "documents.bin", entry["documents"] * DOCUMENT_COLUMNS * item)
    _check_size(tables / "rows.bin", entry["rows"] * ROW_COLUMNS * item)
    for key in entry["shards"]:
        if Shard.load(shards / key) is None:
            raise _broken(shards / key, "is missing or incomplete")
    return Source(
        name=entry["name"],
        role=entry["role"],
        documents=entry["documents"],
        tokens=entry["tokens"],
        layout=layout,
        tables=tables,
        shards=tuple(shards / key / "tokens.bin" for key in entry["shards"]),
        dtype=dtype,
        row_count=entry["rows"],
    )


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _broken(path, "is missing") from error
    if found != size:
        raise _broken(path, f"has {found} bytes instead of {size}")


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path}: prepared data {what}; remove {path.parent} and run again")


# --- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare or check from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cptjob_trainer.prepare", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="a TrainerConfig as JSON")
    parser.add_argument(
        "--check-only", action="store_true", help="check model and data, write nothing"
    )
    options = parser.parse_args(arguments)
    try:
        config = TrainerConfig.load(options.config)
        if options.check_only:
            print(_summary_of_check(check(config, _print_progress)))
        else:
            print(_summary(prepare(config, _print_progress)))
    except CPTJobError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    return 0


def _print_progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what} {100 * done // max(total, 1)} %", end=end, file=sys.stderr, flush=True)


def _summary(prepared: Prepared) -> str:
    lines = [
        f"{source.role} {source.name}: {source.documents} documents, {source.tokens} tokens, "
        f"{source.rows()} rows, {quota} drawn"
        for source, quota in zip(prepared.sources, prepared.quotas, strict=True)
    ]
    lines += [
        f"held out from {source.name}: {source.documents} documents, {source.tokens} tokens"
        for source in prepared.heldout
    ]
    lines += [f"warning: {warning}" for warning in prepared.warnings]
    lines += [f"skipped: {fault}" for fault in prepared.bad_lines[:20]]
    lines.append(
        f"{prepared.total_rows} rows, {prepared.total_steps} steps, in {prepared.directory}"
    )
    return "\n".join(lines)


def _summary_of_check(checked: Checked) -> str:
    lines = [f"model: {checked.model.architecture}, {checked.model.parameters} parameters"]
    lines += [f"{name}: {count} documents" for name, count in checked.documents.items()]
    lines += [f"would be skipped: {fault}" for fault in checked.bad_lines[:20]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
