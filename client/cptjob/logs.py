"""What a job's pods say, as one stream: all ranks, and all attempts whose pods are still there."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client

from cptjob.standing import ENDED, is_true
from cptjob_api.job import GROUP, CPTJob
from cptjob_trainer.errors import ClusterError, MissingInputError, UsageError

#: Of a job's pods. A source begins with the first letter of its pod's.
ROLES = ("coordinator", "worker")

_LOOK_SECONDS = 2.0
_ANSWER = aiohttp.ClientTimeout(total=60, sock_connect=10)
_STREAM = aiohttp.ClientTimeout(sock_connect=10)
#: A longer line is cut by the container runtime itself.
_LINE_BYTES = 1 << 20


class Cluster(Protocol):
    """What is asked of AsyncClient."""

    namespace: str

    async def get(self, name: str) -> CPTJob: ...

    async def call(self, request: Callable[[client.CoreV1Api], Awaitable[Any]]) -> Any: ...


@dataclass(frozen=True)
class LogLine:
    """source: which pod, in short: w1 is worker 1, c0 the coordinator; w1.2.0 that of attempt 2 (and
    replacement 0 in it). time: of the line, RFC 3339 with nanoseconds, as text that sorts.
    """

    source: str
    time: str
    text: str


@dataclass(frozen=True)
class _Pod:
    name: str
    uid: str
    source: str
    began: bool

    @staticmethod
    def of(pod: Any) -> "_Pod":
        labels = pod.metadata.labels or {}
        role, index, attempt, again = (
            labels.get(f"{GROUP}/{key}", "0") for key in ("role", "index", "attempt", "incarnation")
        )
        late = "" if attempt == again == "0" else f".{attempt}.{again}"
        states = [each.state for each in pod.status.container_statuses or () if each.state]
        began = any(each.running or each.terminated for each in states)
        return _Pod(pod.metadata.name, pod.metadata.uid, f"{role[:1]}{index}{late}", began)


async def read(
    cluster: Cluster, name: str, tail: int | None = None, pod: str | None = None
) -> AsyncGenerator[LogLine]:
    """What has been said so far, by time; of each pod the last `tail` lines."""
    await cluster.get(name)
    lines: list[LogLine] = []
    for each in await _pods(cluster, name, pod):
        if each.began:
            async with aclosing(_lines(cluster, each, tail=tail)) as said:
                lines += [line async for line in said]
    for line in sorted(lines, key=lambda line: line.time):
        yield line


async def follow(
    cluster: Cluster, name: str, tail: int | None = None, pod: str | None = None
) -> AsyncGenerator[LogLine]:
    """The same, and what is said from now on, until the job has ended or is gone."""
    await cluster.get(name)
    lines: asyncio.Queue[LogLine | BaseException | None] = asyncio.Queue(1000)
    watching = asyncio.create_task(_follow_all(cluster, name, tail, pod, lines))
    try:
        while (line := await lines.get()) is not None:
            if isinstance(line, BaseException):
                raise line
            yield line
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _follow_all(
    cluster: Cluster,
    name: str,
    tail: int | None,
    only: str | None,
    lines: "asyncio.Queue[LogLine | BaseException | None]",
) -> None:
    """Streams each pod as it begins. Ends with None, or with the error that ended it."""
    streams: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            # In this order: a pod that began before the job's end is not missed.
            ended = await _has_ended(cluster, name)
            for pod in await _pods(cluster, name, only):
                if pod.began and pod.uid not in streams:
                    streams[pod.uid] = asyncio.create_task(_pass_on(cluster, pod, tail, lines))
            if ended:
                await asyncio.gather(*streams.values())
                await lines.put(None)
                return
            await asyncio.sleep(_LOOK_SECONDS)
    except Exception as error:
        await lines.put(error)
    finally:
        for task in streams.values():
            task.cancel()


async def _has_ended(cluster: Cluster, name: str) -> bool:
    try:
        job = await cluster.get(name)
    except MissingInputError:
        return True
    return any(is_true(job, kind) for kind in ENDED)


async def _pass_on(
    cluster: Cluster,
    pod: _Pod,
    tail: int | None,
    lines: "asyncio.Queue[LogLine | BaseException | None]",
) -> None:
    async with aclosing(_lines(cluster, pod, tail=tail, follow=True)) as said:
        async for line in said:
            await lines.put(line)


async def _pods(cluster: Cluster, name: str, only: str | None) -> list[_Pod]:
    """The job's pods, the coordinator first, then workers by index, attempt and replacement.

    only: those of this source, such as w1, of every attempt.
    """
    selector = f"{GROUP}/job-name={name}"
    if only is not None:
        role = next((role for role in ROLES if only.startswith(role[0])), None)
        if role is None or not only[1:].isdecimal():
            raise UsageError(f"there is no pod {only}: w1 is worker 1, c0 the coordinator")
        selector += f",{GROUP}/role={role},{GROUP}/index={only[1:]}"
    listed = await cluster.call(
        lambda core: core.list_namespaced_pod(
            cluster.namespace, label_selector=selector, _request_timeout=_ANSWER
        )
    )
    return sorted(map(_Pod.of, listed.items), key=lambda pod: (pod.source[:1], pod.name))


async def _lines(
    cluster: Cluster, pod: _Pod, *, tail: int | None, follow: bool = False
) -> AsyncGenerator[LogLine]:
    """A pod that goes meanwhile ends its stream; so does a node that is lost. One that cannot be asked
    is told in a line.
    """
    more = {} if tail is None else {"tail_lines": tail}
    try:
        response = await cluster.call(
            lambda core: core.read_namespaced_pod_log(
                pod.name,
                cluster.namespace,
                timestamps=True,
                follow=follow,
                _preload_content=False,
                _request_timeout=_STREAM if follow else _ANSWER,
                **more,
            )
        )
    except MissingInputError:
        return
    except ClusterError as error:
        # The other pods may have something to say.
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        yield LogLine(pod.source, now, f"the log of {pod.name} cannot be read: {error}")
        return
    try:
        async for raw in _split(response.content.iter_any()):
            time, _, text = raw.decode(errors="replace").partition(" ")
            yield LogLine(pod.source, time, text)
    except (aiohttp.ClientError, TimeoutError):
        return
    finally:
        response.close()


async def _split(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Lines without their ends; aiohttp's own would refuse long ones."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > _LINE_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest
