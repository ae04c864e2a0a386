"""Token shards: what a chunk of documents becomes, kept by the digest of its bytes.

    shards/<key>/tokens.bin    ids of all documents, back to back, each with its BOS and EOS
    shards/<key>/offsets.npy   int64 [documents + 1], where each document starts
    shards/<key>/hashes.npy    uint64 [documents], digest of each document's text
    shards/<key>/shard.json    counts, sizes and faults; says that the shard is complete

The key is made of the chunk's bytes, the tokenizer and the options, so a shard is never out of date:
what was prepared once is found again, also after an interruption or when lines were appended. Of a
file that has not changed (known_files.py), the keys are known without its bytes.
"""

import hashlib
import json
import os
import shutil
import signal
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from cptjob_trainer import failpoints, lifeline, unfinished
from cptjob_trainer.data import documents
from cptjob_trainer.data.documents import Chunk
from cptjob_trainer.data.encoder import Encoder
from cptjob_trainer.data.tokenizer import TokenizerInfo
from cptjob_trainer.disk import is_full, is_missing, unreadable
from cptjob_trainer.errors import CPTJobError, DataError, OutputError, StorageFullError

# Changes whenever the same bytes would give another shard.
VERSION = 1

# Faults that a shard remembers; beyond that it only counts.
KEPT_FAULTS = 100

# Below this many bytes, starting processes takes longer than the work.
_ALONE = 2 << 20


@dataclass(frozen=True)
class Options:
    """How chunks become shards. `directory` is where shards lie; None only validates."""

    directory: Path | None
    tokenizer: TokenizerInfo | None
    normalize: Literal["None", "NFC", "NFKC"] = "None"

    def digest(self) -> str:
        if self.tokenizer is None:
            return ""
        parts = [VERSION, self.tokenizer.fingerprint, self.tokenizer.bos_id, self.tokenizer.eos_id]
        return json.dumps([*parts, self.tokenizer.dtype, self.normalize])


@dataclass(frozen=True)
class Shard:
    """What is known of a shard. Faults are (line in the chunk, from 0; message)."""

    key: str
    lines: int = 0
    documents: int = 0
    tokens: int = 0
    item_size: int = 0
    highest_id: int = -1
    lowest_hash: int = 0
    bad_lines: int = 0
    faults: tuple[tuple[int, str], ...] = ()

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The shard at `directory` if it is complete. Raises UnreadableError."""
        try:
            value = json.loads((directory / "shard.json").read_bytes())
            value["faults"] = tuple((line, message) for line, message in value["faults"])
            shard = cls(**value)
            size = (directory / "tokens.bin").stat().st_size
        except OSError as error:
            if not is_missing(error):
                raise unreadable(directory, error) from error
            return None
        except (ValueError, TypeError, KeyError):
            return None
        return shard if size == shard.tokens * shard.item_size else None

    def offsets(self, shards: Path) -> npt.NDArray[np.int64]:
        """Where each document starts in tokens.bin, and its end."""
        return _array(shards / self.key / "offsets.npy").astype(np.int64, copy=False)

    def hashes(self, shards: Path) -> npt.NDArray[np.uint64]:
        """Digest of each document's text."""
        return _array(shards / self.key / "hashes.npy").astype(np.uint64, copy=False)


def _array(path: Path) -> npt.NDArray[np.integer]:
    try:
        loaded: npt.NDArray[np.integer] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and not is_missing(error):
            raise unreadable(path, error) from error
        raise DataError(
            f"{path}: a token shard that is missing or broken; remove its directory and run again"
        ) from error
    return loaded


def text_hash(text: str) -> int:
    """64-bit digest of a document's text: decides what is held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# --- one chunk, in a worker ------------------------------------------------------------------------


def process(chunk: Chunk, options: Options) -> Shard:
    """Make the shard of a chunk, or find it. Without a directory, only validate."""
    if options.directory is None or options.tokenizer is None:
        failpoints.hit("prepare.validate")
        return _validated(chunk)
    found = known(chunk, options.directory)
    if found is not None:
        return found
    digest = hashlib.sha256(options.digest().encode())
    for block in documents.blocks(chunk):
        digest.update(block)
    key = digest.hexdigest()[:32]
    target = options.directory / key
    found = Shard.load(target)
    if found is not None:
        return found
    failpoints.hit("prepare.tokenize")
    try:
        return _written(chunk, options, key, target)
    except OSError as error:
        raise _storage_error(error, options.directory) from error


def known(chunk: Chunk, directory: Path) -> Shard | None:
    """The shard of a chunk that need not be read for it."""
    return None if chunk.key is None else Shard.load(directory / chunk.key)


def _storage_error(error: OSError, directory: Path) -> CPTJobError:
    if is_full(error):
        return StorageFullError(
            f"{directory}: no space left for the tokenised data; make room and run again, what is "
            "finished is kept"
        )
    return OutputError(
        f"{directory}: the tokenised data cannot be written: {error.strerror}; check the output's "
        "path and permissions"
    )


def _validated(chunk: Chunk) -> Shard:
    faults = _Faults()
    good = 0
    for lines in documents.batches(chunk):
        good += len(faults.sort(lines))
    return Shard(
        key="",
        lines=faults.line,
        documents=good,
        bad_lines=faults.bad,
        faults=tuple(faults.kept),
    )


class _Faults:
    """Sorts lines into texts and faults, counting both."""

    def __init__(self) -> None:
        self.line = 0
        self.bad = 0
        self.kept: list[tuple[int, str]] = []

    def sort(self, lines: Sequence[bytes | documents.TooLong]) -> list[str]:
        texts = []
        for number, line in enumerate(lines, self.line):
            text = documents.text_of(line)
            if text is not None:
                texts.append(text)
                continue
            self.bad += 1
            if len(self.kept) < KEPT_FAULTS:
                self.kept.append((number, documents.problem(line)))
        self.line += len(lines)
        return texts


def _written(chunk: Chunk, options: Options, key: str, target: Path) -> Shard:
    """Tokenise into a directory of another name, then give it its own."""
    temporary = unfinished.path_in(target.parent)
    temporary.mkdir()
    try:
        shard = _tokenised(chunk, options, key, temporary)
        if target.exists():
            shutil.rmtree(target, ignore_errors=True)
        try:
            temporary.rename(target)
        except OSError:
            # Another process made the same shard in the meantime.
            if Shard.load(target) is None:
                raise
        return shard
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenised(chunk: Chunk, options: Options, key: str, directory: Path) -> Shard:
    info = options.tokenizer
    assert info is not None
    encoder = _encoder(info)
    item = np.dtype(info.dtype)
    before = b"" if info.bos_id is None else np.array([info.bos_id], item).tobytes()
    after = np.array([info.eos_id], item).tobytes()
    faults = _Faults()
    lengths: list[int] = []
    hashes: list[int] = []
    highest = max(info.eos_id, -1 if info.bos_id is None else info.bos_id)
    with (directory / "tokens.bin").open("wb") as file:
        for lines in documents.batches(chunk):
            texts = faults.sort(lines)
            if options.normalize != "None":
                texts = [unicodedata.normalize(options.normalize, text) for text in texts]
            encoded = [before + ids + after for ids in encoder.encode(texts)]
            hashes += map(text_hash, texts)
            lengths += map(len, encoded)
            together = b"".join(encoded)
            if together:
                highest = max(highest, int(np.frombuffer(together, item).max()))
            file.write(together)
        _sync(file.fileno(), file.flush)
    counts = np.array(lengths, dtype=np.int64) // item.itemsize
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    shard = Shard(
        key=key,
        lines=faults.line,
        documents=len(lengths),
        tokens=int(offsets[-1]),
        item_size=item.itemsize,
        highest_id=highest,
        lowest_hash=min(hashes, default=0),
        bad_lines=faults.bad,
        faults=tuple(faults.kept),
    )
    _save(directory / "offsets.npy", offsets)
    _save(directory / "hashes.npy", np.array(hashes, dtype=np.uint64))
    (directory / "shard.json").write_text(json.dumps(asdict(shard)) + "\n", encoding="utf-8")
    return shard


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file.fileno(), file.flush)


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    """A shard's name says that it is complete, so its bytes must be on the disk before."""
    flush()
    os.fsync(descriptor)


@lru_cache(maxsize=1)
def _encoder(info: TokenizerInfo) -> Encoder:
    """A process keeps the parts it has learnt from one chunk to the next."""
    return Encoder(info)


# --- all chunks, in parallel -----------------------------------------------------------------------


def process_all(
    chunks: Sequence[Chunk],
    options: Options,
    done: Callable[[Chunk], None],
    processes: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Shard | None]:
    """The shard of each chunk, in order; `done` is called as chunks are finished, in any order.

    Ends early, with None, once `stop` says so; what is finished then is found the next time.
    """
    if options.directory is not None:
        try:
            options.directory.mkdir(parents=True, exist_ok=True)
            unfinished.remove_leftovers(options.directory)
        except OSError as error:
            raise _storage_error(error, options.directory) from error
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1 or sum(chunk.size for chunk in chunks if chunk.key is None) < _ALONE:
        for chunk in chunks:
            if stop():
                yield None
                return
            shard = process(chunk, options)
            done(chunk)
            yield shard
        return
    yield from _in_pool(chunks, options, done, min(processes, len(chunks)), stop)


def _in_pool(
    chunks: Sequence[Chunk],
    options: Options,
    done: Callable[[Chunk], None],
    processes: int,
    stop: Callable[[], bool],
) -> Iterator[Shard | None]:
    # Spawned, not forked: the caller may run threads and hold locks.
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_enter_worker, initargs=(os.getpid(),)
    )
    waiting: dict[Future[Shard], int] = {}
    finished: dict[int, Shard] = {}
    submitted = yielded = 0
    try:
        while yielded < len(chunks):
            # A window: futures of a huge corpus are not all made at once.
            while submitted < len(chunks) and len(waiting) < 2 * processes:
                with _ctrl_c_held_back():  # a worker may be started here, and inherits it
                    waiting[pool.submit(process, chunks[submitted], options)] = submitted
                submitted += 1
            ready, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ready:
                number = waiting.pop(future)
                finished[number] = future.result()
                done(chunks[number])
            if stop():
                yield None
                return
            while yielded in finished:
                yield finished.pop(yielded)
                yielded += 1
    except BrokenProcessPool as error:
        raise CPTJobError(
            "a process that tokenises was killed, most likely for lack of memory; give the "
            "coordinator more memory or fewer cores and run again, what is finished is kept"
        ) from error
    finally:
        _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    """Nobody waits for the chunk in hand when a job is stopped: it is done anew."""
    workers = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A worker that is met while it imports would end with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter_worker(parent: int) -> None:
    # Ctrl-C reaches the whole group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not lifeline.signal_on_parent_death(signal.SIGKILL, parent):
        os._exit(1)
