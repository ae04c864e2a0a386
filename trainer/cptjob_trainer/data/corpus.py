"""The data sets of a job as they are read: chunk by chunk, with every fault named."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cptjob_trainer.config import DatasetInput, TrainerConfig
from cptjob_trainer.data import documents, tokens
from cptjob_trainer.data.documents import Chunk
from cptjob_trainer.data.known_files import KnownFiles
from cptjob_trainer.data.tokens import Options, Shard
from cptjob_trainer.errors import ConfigError, DataError, Fault, Stopped
from cptjob_trainer.words import counted

# Faults and skipped lines that are kept; beyond that they are counted.
_KEPT_FAULTS = 200

VALIDATE = Options(None, None)


@dataclass
class Given:
    """A data set while it is prepared. `held_out` data is not trained on."""

    dataset: DatasetInput
    held_out: bool
    chunks: list[Chunk] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass
class Faults:
    """Faults in the order of the files; those of files as a whole are never tolerated."""

    limit: int
    files: list[Fault] = field(default_factory=list)
    lines: list[Fault] = field(default_factory=list)
    bad_lines: int = 0

    @property
    def too_many(self) -> bool:
        return bool(self.files) or self.bad_lines > self.limit

    def add(self, path: Path, first_line: int, shard: Shard) -> None:
        """Those of a chunk of `path` that begins at `first_line`, counted from 1."""
        self.bad_lines += shard.bad_lines
        for line, message in shard.faults[: max(0, _KEPT_FAULTS - len(self.lines))]:
            self.lines.append(Fault(str(path), first_line + line, message))

    def error(self) -> DataError:
        """All of them in one error."""
        shown = [*self.files, *self.lines]
        count = len(self.files) + self.bad_lines
        allowed = (
            f" ({counted(self.limit, 'bad line is', 'bad lines are')} allowed)"
            if self.limit and self.bad_lines
            else ""
        )
        noun = "fault" if count == 1 else "faults"
        return DataError(f"the data has {count} {noun}{allowed}:", shown, more=count - len(shown))


class Corpus:
    """All data sets of a job, those that are trained on first."""

    def __init__(self, config: TrainerConfig) -> None:
        """Finds the files. Raises ConfigError when there is no data set, MissingInputError."""
        if not config.datasets:
            raise ConfigError("datasets: at least one is needed; add one with role Domain")
        self.faults = Faults(config.data.max_bad_lines)
        self.given = [Given(dataset, False) for dataset in config.datasets]
        self.given += [Given(dataset, True) for dataset in config.validation.datasets]
        for given in self.given:
            for path in documents.files(given.dataset.path, self.faults.files):
                given.chunks.extend(documents.chunks(path))

    def read(
        self,
        options: Options,
        report: Callable[[int, int], None],
        *,
        stop: Callable[[], bool],
        processes: int | None,
        known: KnownFiles | None = None,
    ) -> None:
        """Validate all chunks, and tokenise them when `options` name a directory.

        Files that are `known` and have not changed are not read.

        `report(done, total)` counts bytes. Once it is clear that the data is refused, the rest is
        only validated: all faults are wanted, the tokens are not. Raises DataError when the data
        cannot be used, Stopped once `stop` says so.
        """
        if known is not None:
            self._recognise(known, options)
        pairs = [(given, chunk) for given in self.given for chunk in given.chunks]
        total = sum(chunk.size for _, chunk in pairs)
        lines: dict[Path, int] = {}
        finished = at = 0

        def done(chunk: Chunk) -> None:
            nonlocal finished
            finished += chunk.size
            report(finished, total)

        report(0, total)
        while at < len(pairs):
            tokenising = options.directory is not None and not self.faults.too_many
            finished = sum(chunk.size for _, chunk in pairs[:at])
            chunks = [chunk for _, chunk in pairs[at:]]
            chosen = options if tokenising else VALIDATE
            for shard in tokens.process_all(chunks, chosen, done, processes, stop):
                if shard is None:
                    raise Stopped(
                        "stopped while preparing; run the same command to continue, what is "
                        "finished is kept"
                    )
                given, chunk = pairs[at]
                if known is not None:
                    known.note(chunk, shard.key)
                # Its faults go with those of all; each shard's would grow with the corpus.
                given.shards.append(replace(shard, faults=()))
                self.faults.add(chunk.path, lines.get(chunk.path, 0) + 1, shard)
                lines[chunk.path] = lines.get(chunk.path, 0) + shard.lines
                at += 1
                if tokenising and self.faults.too_many:
                    break
        self._check()

    def _recognise(self, known: KnownFiles, options: Options) -> None:
        """Give each chunk the key that is known, where its shard is still there."""
        assert options.directory is not None
        for path in {chunk.path for given in self.given for chunk in given.chunks}:
            with documents.reading(path):
                known.begin(path)
        for given in self.given:
            marked = [replace(chunk, key=known.key(chunk)) for chunk in given.chunks]
            given.chunks = [
                chunk if tokens.known(chunk, options.directory) else replace(chunk, key=None)
                for chunk in marked
            ]

    def _check(self) -> None:
        if self.faults.too_many:
            raise self.faults.error()
        for given in self.given:
            if given.documents == 0:
                raise DataError(
                    f"{given.dataset.path}: data set {given.dataset.name} has no usable document; "
                    "add documents or remove the data set",
                    self.faults.lines,
                    more=self.faults.bad_lines - len(self.faults.lines),
                )
