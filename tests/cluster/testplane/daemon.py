"""A long-running program with a log, which dies with the process that started it."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cptjob_trainer.lifeline import signal_on_parent_death

STOP_SECONDS = 20.0
LAST_LINES = 20


class DaemonError(Exception):
    """A program of the control plane ended or never got ready; the message has its last lines."""


class Daemon:
    """One program. It may be started again after it was stopped; its log goes on."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.environment = environment
        self.command = list(command)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises DaemonError when the program does not run."""
        self.check()
        assert self._process is not None
        return self._process.pid

    @property
    def started(self) -> bool:
        """Whether it shall run now: it was started, and neither stopped nor killed since."""
        return self._process is not None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Call it from the main thread: the kernel ends the program with the thread that forked."""
        assert not self.running, f"{self.name} runs already"
        parent = os.getpid()

        def follow() -> None:
            if not signal_on_parent_death(signal.SIGKILL, parent):
                os._exit(1)

        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the tests, not for it
                preexec_fn=follow,
            )

    def check(self) -> None:
        """Raises DaemonError when the program does not run."""
        if not self.running:
            how = "was not started" if self._process is None else f"ended ({self._process.poll()})"
            raise DaemonError(f"{self.name} {how}; its log {self.log} ends with\n{self.tail()}")

    def stop(self) -> None:
        """Asks it to end, and ends it when it does not."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it without asking."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def tail(self, lines: int = LAST_LINES) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def memory(self) -> int:
        """Bytes that it holds in memory (resident set)."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
