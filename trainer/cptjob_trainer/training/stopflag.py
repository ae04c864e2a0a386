"""A stop that a signal asks for, until somebody looks."""

import signal
from types import FrameType
from typing import NoReturn

from cptjob_trainer.errors import Stopped


class StopFlag:
    """Set by SIGTERM or SIGINT. The loop looks at it; before there is a loop it ends the process."""

    def __init__(self) -> None:
        self.asked = False
        self._heeded = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def heed(self) -> None:
        """From now on somebody looks at `asked`."""
        self._heeded = True
        if self.asked:
            self._end()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if not self._heeded:
            self._end()

    @staticmethod
    def _end() -> NoReturn:
        raise Stopped("stopped before a step was trained; the same command goes on from there")
