"""CPTJobs of a cluster, from a script or a notebook: the same as cluster.py, without asyncio."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from cptjob.cluster import RESTS, AsyncClient
from cptjob.logs import LogLine
from cptjob_api.conditions import Condition
from cptjob_api.job import CPTJob
from cptjob_api.status import TrainerStatus

T = TypeVar("T")


class Client:
    """CPTJobs in one namespace. Arguments and errors are those of AsyncClient.

    It has an event loop in a thread of its own, so it works where another runs already.
    """

    def __init__(
        self,
        namespace: str | None = None,
        *,
        context: str | None = None,
        kubeconfig: Path | str | None = None,
    ) -> None:
        self._client = AsyncClient(namespace, context=context, kubeconfig=kubeconfig)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="cptjob-client", daemon=True).start()
        self._run(self._client.__aenter__())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def namespace(self) -> str:
        """Where the jobs are."""
        return self._client.namespace

    def close(self) -> None:
        """Ends the connections and the thread."""
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)

    def create(self, job: CPTJob) -> CPTJob:
        """See AsyncClient.create."""
        return self._run(self._client.create(job))

    def get(self, name: str) -> CPTJob:
        """See AsyncClient.get."""
        return self._run(self._client.get(name))

    def list(self) -> "list[CPTJob]":
        """See AsyncClient.list."""
        return self._run(self._client.list())

    def suspend(self, name: str) -> CPTJob:
        """See AsyncClient.suspend."""
        return self._run(self._client.suspend(name))

    def resume(self, name: str) -> CPTJob:
        """See AsyncClient.resume."""
        return self._run(self._client.resume(name))

    def delete(self, name: str) -> None:
        """See AsyncClient.delete."""
        self._run(self._client.delete(name))

    def watch(self, name: str) -> Iterator[CPTJob]:
        """See AsyncClient.watch."""
        return self._each(self._client.watch(name))

    def progress(self, name: str) -> Iterator[TrainerStatus]:
        """See AsyncClient.progress."""
        return self._each(self._client.progress(name))

    def logs(
        self, name: str, *, follow: bool = False, tail: int | None = None, pod: str | None = None
    ) -> Iterator[LogLine]:
        """See AsyncClient.logs."""
        return self._each(self._client.logs(name, follow=follow, tail=tail, pod=pod))

    def wait(
        self,
        name: str,
        until: Condition | tuple[Condition, ...] = RESTS,
        seconds: float | None = None,
        see: Callable[[CPTJob], object] | None = None,
    ) -> CPTJob:
        """See AsyncClient.wait."""
        return self._run(self._client.wait(name, until, seconds, see))

    def _each(self, values: AsyncGenerator[T]) -> Iterator[T]:
        try:
            while True:
                try:
                    yield self._run(_next(values))
                except StopAsyncIteration:
                    return
        finally:
            self._run(values.aclose())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


async def _next(values: AsyncGenerator[T]) -> T:
    return await anext(values)
