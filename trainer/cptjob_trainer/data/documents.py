"""Reading JSONL: which files, which lines, and what is wrong with them.

A data set is a `.jsonl` file or a directory of them. Each line is a JSON object with exactly one
field `text`, a string that is more than white space. Hidden files and `lost+found` are passed over;
any other file is a fault, as are blank lines. Files are cut into **chunks** of whole lines, which
are what is read in parallel and cached.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path

import orjson

from cptjob_trainer.data.request import EXTENSION, names
from cptjob_trainer.disk import is_missing, unreadable
from cptjob_trainer.errors import DataError, Fault, MissingInputError

# A longer line is no document but a file without line breaks.
MAX_LINE = 32 << 20

# Lines that start in the same stretch of this many bytes are one chunk. Small enough for progress
# and for a cache that survives an appended line, large enough to keep a process busy.
CHUNK = 8 << 20
# Of very large files, so that their chunks stay countable.
LARGE_FILE, LARGE_CHUNK = 2 << 30, 64 << 20

_BLOCK = 1 << 20
# Characters of a field's name that a message shows.
_SHOWN_NAME = 80
_EXAMPLE = '{"text": "..."}'

_MAGIC = {
    b"\x1f\x8b": "compressed (gzip); unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it first",
    b"BZh": "compressed (bzip2); unpack it first",
    b"\xfd7zXZ\x00": "compressed (xz); unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; convert it to JSON lines",
    b"age-encryption.org/": "encrypted (age); decrypt it first",
    b"Salted__": "encrypted (openssl); decrypt it first",
    b"-----BEGIN PGP": "encrypted (PGP); decrypt it first",
    b"\xff\xfe": "UTF-16, not UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\xef\xbb\xbf": "starts with a byte order mark (BOM); save it as UTF-8 without one",
}


@dataclass(frozen=True)
class Chunk:
    """Bytes [start, end) of a file: whole lines. `key` is its shard's, where that is known."""

    path: Path
    start: int
    end: int
    key: str | None = None

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TooLong:
    """Stands for a line over MAX_LINE; `size` in bytes."""

    size: int


def files(path: Path, faults: list[Fault]) -> list[Path]:
    """The .jsonl files of a data set, in order of name; what else lies there goes to `faults`.

    Raises MissingInputError when there is nothing at `path`, DataError when it is the wrong thing.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise MissingInputError(
            f"{path}: the data set cannot be read ({error.strerror}); check storageUri and the "
            "volume"
        ) from error
    if stat.S_ISREG(mode):
        candidates = [path]
    else:
        candidates = _directory(path)
    found = []
    for candidate in candidates:
        problem = _file_problem(candidate)
        if problem:
            faults.append(Fault(str(candidate), 0, problem))
        else:
            found.append(candidate)
    if not candidates:
        raise DataError(f"{path}: holds no file; put {EXTENSION} files there")
    return found


def _directory(path: Path) -> list[Path]:
    try:
        return [path / name for name in names(path)]
    except OSError as error:
        raise MissingInputError(f"{path}: the data set cannot be read: {error.strerror}") from error


def _file_problem(path: Path) -> str | None:
    """Why a file cannot be read as a whole, or None."""
    if path.is_dir():
        return "a directory inside the data set; put all files into one directory"
    if path.suffix != EXTENSION:
        return _wrong_ending(path.suffix)
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except PermissionError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not head:
        return "the file is empty; remove it, or write documents into it"
    for magic, problem in _MAGIC.items():
        if head.startswith(magic):
            return problem
    return None


def _wrong_ending(suffix: str) -> str:
    if suffix.lower() == EXTENSION:
        return f"the name must end in {EXTENSION}, in lower case; rename it"
    if suffix.lower() in (".json", ".ndjson"):
        return (
            f"not a {EXTENSION} file; if each line is one object {_EXAMPLE}, rename it, else "
            f"convert it, or move it away"
        )
    return f"not a {EXTENSION} file; unpack or convert it, or move it away"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns faults of reading a data file into ours."""
    try:
        yield
    except OSError as error:
        if is_missing(error):
            raise MissingInputError(f"{path}: went away while it was read; run again") from error
        raise unreadable(path, error) from error


def chunks(path: Path) -> Iterator[Chunk]:
    """Cut a file at line borders."""
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        step = LARGE_CHUNK if size >= LARGE_FILE else CHUNK
        start = 0
        while start < size:
            end = _line_start(file.fileno(), (start // step + 1) * step, size)
            yield Chunk(path, start, end)
            start = end


def _line_start(descriptor: int, at: int, size: int) -> int:
    """Where the first line that starts at or after `at` starts; `size` when there is none."""
    at -= 1
    while at < size:
        block = os.pread(descriptor, _BLOCK, at)
        if not block:
            return size
        found = block.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(block)
    return size


def blocks(chunk: Chunk) -> Iterator[bytes]:
    """The bytes of a chunk, in blocks."""
    with reading(chunk.path), chunk.path.open("rb") as file:
        file.seek(chunk.start)
        left = chunk.size
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise DataError(f"{chunk.path}: became shorter while it was read; run again")
            left -= len(block)
            yield block


def batches(chunk: Chunk) -> Iterator[list[bytes | TooLong]]:
    """The lines of a chunk without their line breaks, about a block's worth at a time."""
    parts: list[bytes] = []
    held = 0
    for block in blocks(chunk):
        first, *rest = block.split(b"\n")
        held += len(first)
        if held <= MAX_LINE:
            parts.append(first)
        else:
            # Only the size of such a line is of interest.
            parts = []
        if not rest:
            continue
        yield [_joined(parts, held), *rest[:-1]]
        parts, held = [rest[-1]], len(rest[-1])
    if held:
        yield [_joined(parts, held)]


def _joined(parts: list[bytes], held: int) -> bytes | TooLong:
    return b"".join(parts) if held <= MAX_LINE else TooLong(held)


def text_of(line: bytes | TooLong) -> str | None:
    """The document of a line; None when something is wrong with it."""
    if isinstance(line, TooLong):
        return None
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict or len(value) != 1:
        return None
    text = value.get("text")
    if type(text) is not str or not text or text.isspace():
        return None
    # A field given twice is seen only in the raw line. In a JSON string the quotes are escaped, so
    # that one match is the field's name.
    if line.count(b'"text"') > 1 and _repeated(line):
        return None
    return text


def problem(line: bytes | TooLong) -> str:
    """What is wrong with a line for which `text_of` gave None."""
    if isinstance(line, TooLong):
        return (
            f"the line has {line.size / 2**20:.0f} MiB, the limit is {MAX_LINE >> 20} MiB; "
            "split the document"
        )
    if not line.strip():
        return "blank line; remove it"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return (
            f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}; convert "
            "the file to UTF-8"
        )
    if text.startswith("\ufeff"):
        return "starts with a byte order mark (BOM); save the file as UTF-8 without one"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return (
            f"broken JSON at column {error.colno} ({error.msg.partition(': line ')[0]}); "
            f"each line must be one object {_EXAMPLE}"
        )
    return _value_problem(value, line)


def _value_problem(value: object, line: bytes) -> str:
    if not isinstance(value, dict):
        return f"is {_kind(value)}, not an object; each line must be one object {_EXAMPLE}"
    further = [name for name in value if name != "text"]
    if "text" not in value:
        names = _shown(further) or "no field at all"
        return f'field "text" is missing (there is {names}); each line must be {_EXAMPLE}'
    if further:
        return f'has a further field {_shown(further)}; keep "text" only'
    if not isinstance(value["text"], str):
        return f'"text" is {_kind(value["text"])}, not a string'
    if not value["text"].strip():
        return '"text" is empty or only white space; remove the line'
    return 'has the field "text" more than once; keep one'


def _shown(names: list[str]) -> str:
    """The first names of fields, short and without characters that a terminal acts upon."""
    return ", ".join(f'"{_printable(name)}"' for name in names[:3])


def _printable(name: str) -> str:
    cut = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in name[:_SHOWN_NAME]
    )
    return cut if len(name) <= _SHOWN_NAME else f"{cut}..."


def _repeated(line: bytes) -> bool:
    try:
        pairs = JSONDecoder(object_pairs_hook=list).decode(line.decode())
    except (JSONDecodeError, RecursionError):
        return True
    return len(pairs) > 1


def _kind(value: object) -> str:
    """A JSON value's type as a person calls it."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
