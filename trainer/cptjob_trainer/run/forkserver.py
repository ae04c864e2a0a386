"""The warm process that workers are forked from, so that a restarted worker starts at once.

`start` runs in the launcher. It makes Python's fork server import this module first and the
worker's module after it; the import of this module ties the server's life to the launcher's. A fork
of the server then holds torch and transformers already. The server runs no thread and touches no
device: neither survives a fork.
"""

import importlib
import os
import signal
import sys
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from cptjob_trainer import lifeline, termination

_LAUNCHER_VARIABLE = "CPTJOB_FORKSERVER_OF"

#: Process id of the fork server; set in the server and so in every worker forked from it.
_server: int | None = None


def start(entrypoint: str) -> None:
    """Starts the server, which then imports the module of ``entrypoint`` ("module:function").

    Returns at once. To be called from the main thread, before anything heavy is imported, with the
    environment (thread counts) that the workers are to have.
    """
    forkserver.set_forkserver_preload([__name__, entrypoint.partition(":")[0]])
    ensure_running()


def ensure_running() -> None:
    """Starts the server if it is not alive, as after an out-of-memory kill."""
    os.environ[_LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[_LAUNCHER_VARIABLE]


def spawn(entrypoint: str, argument: str, environment: dict[str, str]) -> ForkServerProcess:
    """Starts ``entrypoint(argument)`` in a fork of the server, with ``environment`` added."""
    ensure_running()
    process = get_context("forkserver").Process(
        target=_run, args=(entrypoint, argument, environment), daemon=False
    )
    process.start()
    return process


def _run(entrypoint: str, argument: str, environment: dict[str, str]) -> None:
    """The body of a worker process."""
    if _server is None or not lifeline.signal_on_parent_death(signal.SIGKILL, _server):
        os._exit(1)
    # The server ignores these; a worker sets its own handlers, and until then may be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A terminal sends Ctrl-C to the whole group; the launcher decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    module, _, function = entrypoint.partition(":")
    with termination.guard():
        getattr(importlib.import_module(module), function)(argument)


def _tie_to_launcher() -> None:
    """Runs in the server before its heavy imports: it is to die with the launcher."""
    global _server
    launcher = os.environ.pop(_LAUNCHER_VARIABLE, None)
    if launcher is None or int(launcher) == os.getpid():
        return
    if not lifeline.signal_on_parent_death(signal.SIGKILL, int(launcher)):
        os._exit(1)
    # A signal to the whole process group must not take the server, and so the workers, before they
    # have saved.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _server = os.getpid()


def threads() -> int:
    """Number of threads of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 1


_tie_to_launcher()
