"""What runs for the time of a with statement."""

from types import TracebackType
from typing import Self


class Lifespan:
    """`start` and `stop`, or a with statement; what fails at its start is stopped as well."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
