"""What was prepared for a job: the value that training begins with, read back and checked.

    <prepared>/shards/<key>/             token shards, see tokens.py
    <prepared>/<digest>/train/<n>/       tables of each training source, see tables.py
    <prepared>/<digest>/heldout/<n>/     tables of each held-out source
    <prepared>/<digest>/prepared.json    counts, quotas, fingerprints

The directory of a digest appears whole or not at all, and a later preparation with other data or
settings leaves it alone.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from cptjob_trainer.data import shares
from cptjob_trainer.data.mix import Mix
from cptjob_trainer.data.rows import DOCUMENT_COLUMNS, ROW_COLUMNS, Layout, Source
from cptjob_trainer.data.tokens import Shard
from cptjob_trainer.disk import is_missing, unreadable
from cptjob_trainer.errors import CPTJobError, DataError, Fault

VERSION: Final = 1
FILE: Final = "prepared.json"


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

    def drawn(self, global_batch: int) -> int:
        """Rows that the job trains on: all, but for those that maxSteps cuts off."""
        return shares.drawn(self.total_rows, global_batch, self.total_steps)

    def mix(self, seed: int) -> Mix:
        """The order of the training rows."""
        return Mix([source.rows() for source in self.sources], self.quotas, seed)


def load_prepared(directory: Path) -> Prepared:
    """Read what was prepared. Raises DataError when something is missing or of the wrong size,
    UnreadableError when that cannot be told.
    """
    path = directory / FILE
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _fault(path, error) from error
    except ValueError as error:
        raise _broken(path, "cannot be read") from error
    if value.get("version") != VERSION:
        raise _broken(path, f"is of version {value.get('version')}, not {VERSION}")
    try:
        return _parsed(value, directory)
    except (KeyError, TypeError) as error:
        raise _broken(path, "lacks an entry") from error


def _parsed(value: dict[str, Any], directory: Path) -> Prepared:
    layout = Layout(value["maxLength"], value["packed"], tuple(value["promptIds"]), value["bos"])
    shards = directory.parent / "shards"

    def sources(entries: list[dict[str, Any]]) -> tuple[Source, ...]:
        return tuple(_source(entry, directory, shards, layout, value["dtype"]) for entry in entries)

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
        raise _fault(path, error) from error
    if found != size:
        raise _broken(path, f"has {found} bytes instead of {size}")


def _fault(path: Path, error: OSError) -> CPTJobError:
    return _broken(path, "is missing") if is_missing(error) else unreadable(path, error)


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path}: prepared data {what}; remove {path.parent} and run again")


# -- the directory ---------------------------------------------------------------------------------


def found_whole(directory: Path) -> Prepared | None:
    """What is in `directory`; what is broken there is removed, as it can be made again.

    Raises UnreadableError for what may be whole, and stays.
    """
    try:
        return load_prepared(directory)
    except DataError:
        shutil.rmtree(directory, ignore_errors=True)
        return None


def publish(temporary: Path, directory: Path) -> None:
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
