"""Prepares a job's data, then hosts the store its processes meet in and serves its progress.

    python -m cptjob_trainer.run.coordinator --config CONFIG.json --store-port PORT --http-port PORT

It needs no device. Nothing heavy is imported before preparing is done, so that broken data is
reported at once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cptjob_trainer import lifeline, termination
from cptjob_trainer.checkpoint import lineage
from cptjob_trainer.config import TrainerConfig, digest
from cptjob_trainer.errors import NEVER_RETRIED, Stopped
from cptjob_trainer.model import presets
from cptjob_trainer.termination import Termination
from cptjob_trainer.training.narrator import Narrator, describe
from cptjob_trainer.training.progress import STORE_KEY, Progress, ProgressServer, Resolved
from cptjob_trainer.training.schedule import default_warmup
from cptjob_trainer.words import counted

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

    from cptjob_trainer.data.prepared import Prepared

_POLL_SECONDS = 0.25
_READ_BYTES = 1 << 24
#: Name of the file in --address-directory with the address of the HTTP server, and of the store.
HTTP_FILE = "http.address"
STORE_FILE = "store.address"
#: What a person is warned of, a line each; it grows while the job runs.
WARNINGS_FILE = "warnings.txt"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the coordinator process."""
    options = _parse(arguments)
    with termination.guard():
        _coordinate(options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cptjob_trainer.run.coordinator", description=__doc__)
    parser.add_argument("--config", required=True, help="AcceptedConfig as JSON")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--store-port", type=int, default=29400, help="0: any free port")
    parser.add_argument("--http-port", type=int, default=9400, help="0: any free port")
    parser.add_argument(
        "--address-directory", help="where to write the addresses that were taken, and warnings"
    )
    parser.add_argument(
        "--stay",
        action="store_true",
        help="serve on for the next try when the processes failed in a way that may pass",
    )
    parser.add_argument(
        "--prepare", default="cptjob_trainer.data.prepare:prepare", help=argparse.SUPPRESS
    )
    return parser.parse_args(arguments)


class _Lifetime:
    """What signals mean here: a stop ends it at once, a dead client leaves workers time to save."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._preparing = True
        self.stopping = False
        self.deadline = float("inf")

    def follow(self) -> None:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._orphaned)
        self.stopping = not lifeline.follow_parent(signal.SIGHUP)

    def serving(self) -> None:
        """From now on workers may depend on the store. Raises Stopped when a stop came before."""
        self._preparing = False
        if self.stopping:
            raise Stopped("the coordinator was asked to stop")

    def over(self) -> None:
        """From now on a stop changes nothing: the job has ended, and it is known how."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        if not self._preparing:
            raise Stopped("the coordinator was asked to stop")

    def _orphaned(self, number: int, frame: FrameType | None) -> None:
        if self._preparing:
            self._stop(number, frame)
        self.deadline = time.monotonic() + self._grace_seconds


def _coordinate(options: argparse.Namespace) -> None:
    config = presets.load(options.config)
    lifetime = _Lifetime(config.checkpoint.grace_period_seconds + 5.0)
    lifetime.follow()
    server = ProgressServer(options.host, options.http_port)
    _write_address(options, HTTP_FILE, server.port)
    lineage.check_before_preparing(config)
    prepared = _prepare(options.prepare, config, server, lifetime)
    told = _Warnings(options, server)
    told.add(prepared.warnings)
    result = digest(config, prepared.model_fingerprint, prepared.data_fingerprint)
    server.set_resolved(_resolved(config, prepared.total_steps, result))
    if _is_complete(config.paths.output, result, server, lifetime):
        message = f"{config.paths.output} is complete; nothing is left to do"
        print(message, flush=True)
        termination.write(Termination(0, "AlreadyComplete", message, time=time.time()))
        return
    print(f"prepared {counted(prepared.total_steps, 'step')}; waiting for workers", flush=True)
    server.update(Progress(phase="Loading", message="starting the training processes"))

    from cptjob_trainer import store  # imports torch

    lifetime.serving()
    host = store.host(options.host, options.store_port)
    host.set(store.PREPARED_KEY, str(prepared.directory))
    _write_address(options, STORE_FILE, host.port)
    server.set_ready()
    _serve(host, server, lifetime, told, stay=options.stay)
    server.close()


def _prepare(
    function: str, config: TrainerConfig, server: ProgressServer, lifetime: _Lifetime
) -> "Prepared":
    """Prepares the data in this process."""
    import importlib

    module, _, name = function.partition(":")

    narrator = Narrator(partial(print, flush=True))

    def report(what: str, done: int, total: int) -> None:
        percentage = 100.0 * done / total if total else 0.0
        progress = Progress(phase="Preparing", message=what, progress_percentage=percentage)
        server.update(progress)
        narrator.tell(progress.phase, lambda: _words(progress), now=done == total)

    prepare = getattr(importlib.import_module(module), name)
    prepared: Prepared = prepare(config, report, stop=lambda: lifetime.stopping)
    if lifetime.stopping:
        raise Stopped("the coordinator was asked to stop")
    return prepared


def _resolved(config: TrainerConfig, total_steps: int, result: str) -> Resolved:
    training = config.training
    warmup = training.schedule.warmup_steps
    return Resolved(
        max_length=training.max_length,
        batch_size_per_device=training.batch_size_per_device,
        global_batch_size=training.global_batch_size,
        warmup_steps=default_warmup(total_steps) if warmup is None else warmup,
        total_steps=total_steps,
        digest=result,
    )


def _is_complete(output: Path, result: str, server: ProgressServer, lifetime: _Lifetime) -> bool:
    """True when ``output`` holds the whole result of the job that ``result`` stands for.

    Every file is read and digested, however large the model is: "nothing is left to do" is all the
    person gets to hear, a broken file of the right size would stay unnoticed, and whoever loads the
    model reads it once as well. Only a job that was done before pays for it; the files of another
    job, or of another size, are not read.
    """
    try:
        manifest = json.loads((output / "manifest.json").read_bytes())
        files = {output / name: said for name, said in manifest["files"].items()}
        if manifest["digest"] != result or any(
            path.stat().st_size != said["bytes"] for path, said in files.items()
        ):
            return False
        server.update(Progress(phase="Preparing", message="checking the finished model"))
        return all(_sha256(path, lifetime) == said["sha256"] for path, said in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path, lifetime: _Lifetime) -> str:
    """The file's digest in hex digits. Raises Stopped."""
    digested = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            if lifetime.stopping:
                raise Stopped("the coordinator was asked to stop")
            digested.update(block)
    return digested.hexdigest()


def _write_address(options: argparse.Namespace, name: str, port: int) -> None:
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    _write_file(options, name, f"{host}:{port}\n")


def _write_file(options: argparse.Namespace, name: str, text: str) -> None:
    """Leaves a file for the client, whole or not at all."""
    if options.address_directory is None:
        return
    target = Path(options.address_directory) / name
    temporary = target.with_name(f".{name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(target)


class _Warnings:
    """What a person is warned of: in this process's log, over HTTP and in a file."""

    def __init__(self, options: argparse.Namespace, server: ProgressServer) -> None:
        self._options = options
        self._server = server
        self._lines: list[str] = []

    def add(self, lines: Iterable[str]) -> None:
        new = list(lines)
        self._lines += new
        self._server.set_warnings(self._lines)
        # A full disk, with the log and the file on it, may be what is warned of.
        with contextlib.suppress(OSError):
            for line in new:
                print(f"warning: {line}", flush=True)
        with contextlib.suppress(OSError):
            _write_file(self._options, WARNINGS_FILE, "\n".join(self._lines))


def _serve(
    host: "TCPStore", server: ProgressServer, lifetime: _Lifetime, told: _Warnings, *, stay: bool
) -> None:
    """Passes progress and warnings on until a launcher says that the job is over.

    stay: a try that may be made again does not end the job.
    """
    from cptjob_trainer import store

    warned = 0
    while time.monotonic() < lifetime.deadline:
        if host.check([STORE_KEY]):
            server.update(_read(host.get(STORE_KEY), server.current()))
        done = host.check([store.DONE_KEY])
        # After that question: who says that the job is done has warned before.
        if new := store.warnings(host)[warned:]:
            warned += len(new)
            told.add(new)
        if done:
            ended = Termination.from_json(host.get(store.DONE_KEY).decode())
            last = _final(server.current(), ended)
            server.update(last)
            if stay and ended.exit_code not in (0, *NEVER_RETRIED):
                host.delete_key(store.DONE_KEY)
                continue
            lifetime.over()
            print(f"{last.phase}: {_words(last)}", flush=True)
            _say_how_it_ended(last, ended)
            # Whoever watches the progress gets to see the end of it.
            time.sleep(2 * _POLL_SECONDS)
            return
        time.sleep(_POLL_SECONDS)


def _say_how_it_ended(last: Progress, ended: Termination) -> None:
    """The end of the job, for whoever started the coordinator: it is not its own failure.

    A complete job's message is the last report, so that its figures are not lost with the process.
    """
    complete = ended.exit_code == 0
    reason, message = ("Complete", _short(last)) if complete else ("Ended", ended.message)
    termination.write(Termination(0, reason, message, time=time.time()))


def _short(last: Progress) -> str:
    """The report as JSON that fits a termination message; figures of single data sets go first."""
    metrics = dict(sorted(last.metrics.items(), key=lambda item: "/" in item[0]))
    while len(said := last.to_json()) > termination.MAX_MESSAGE_BYTES and metrics:
        metrics.popitem()
        last = last.model_copy(update={"metrics": metrics})
    return said.decode()


def _words(progress: Progress) -> str:
    return describe(progress.model_dump(by_alias=True))


def _read(value: bytes, previous: Progress) -> Progress:
    try:
        return Progress.model_validate_json(value)
    except ValueError:
        return previous  # written by another version; a wrong report is worse than an old one


def _final(last: Progress, ended: Termination) -> Progress:
    if ended.exit_code == 0:
        return last.model_copy(update={"phase": "Complete"})
    stopped = ended.exit_code == termination.STOPPED
    return last.model_copy(
        update={"phase": "Stopped" if stopped else "Failed", "message": ended.message}
    )


if __name__ == "__main__":
    main()
