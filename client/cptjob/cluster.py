"""CPTJobs of a cluster, for asyncio: create, read, wait for, follow, logs, suspend, resume, delete."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import aiohttp
from kubernetes.aio import client, config

from cptjob import logs
from cptjob.logs import LogLine
from cptjob.standing import ENDED, is_true
from cptjob_api.conditions import Condition
from cptjob_api.job import GROUP, PLURAL, VERSION, CPTJob
from cptjob_api.status import TrainerStatus
from cptjob_trainer.errors import (
    ClusterError,
    CPTJobError,
    MissingInputError,
    RefusedError,
    TooLongError,
)

Object = dict[str, Any]

#: A job with one of these changes only when somebody changes something.
RESTS = (*ENDED, Condition.STALLED)

# So long one watch lasts; then the job is read again, with credentials that are valid still.
_WATCH_SECONDS = 240
_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=10)
_WATCH_TIMEOUT = aiohttp.ClientTimeout(sock_connect=10, sock_read=_WATCH_SECONDS + 30)
_CONFIGURE = "give --kubeconfig FILE or set KUBECONFIG; `cptjob run` needs no cluster"
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class AsyncClient:
    """CPTJobs in one namespace.

    namespace, context, kubeconfig: as kubectl takes them. By default those of the current context
    in $KUBECONFIG or ~/.kube/config; in a pod without any, its service account's. Use it in `async
    with`. Every method raises ClusterError when the cluster cannot be reached or does not allow it,
    and MissingInputError when there is no such job.
    """

    def __init__(
        self,
        namespace: str | None = None,
        *,
        context: str | None = None,
        kubeconfig: Path | str | None = None,
    ) -> None:
        self.namespace = namespace or ""
        self._context = context
        self._kubeconfig = str(kubeconfig) if kubeconfig else None
        self._api: client.ApiClient | None = None

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections."""
        if self._api is not None:
            await self._api.close()
            self._api = None

    async def create(self, job: CPTJob) -> CPTJob:
        """Makes a job. Raises RefusedError, also when there is one of that name."""
        body = job.manifest()
        made = await self._ask(
            job.metadata.name,
            lambda jobs, place: jobs.create_namespaced_custom_object(
                **place, body=body, _request_timeout=_TIMEOUT
            ),
        )
        return _job(made)

    async def get(self, name: str) -> CPTJob:
        """A job as it is now."""
        found = await self._ask(
            name,
            lambda jobs, place: jobs.get_namespaced_custom_object(
                **place, name=name, _request_timeout=_TIMEOUT
            ),
        )
        return _job(found)

    async def list(self) -> "list[CPTJob]":
        """All jobs of the namespace, by name."""
        found = await self._ask(
            None,
            lambda jobs, place: jobs.list_namespaced_custom_object(
                **place, _request_timeout=_TIMEOUT
            ),
        )
        return sorted(map(_job, found["items"]), key=lambda job: job.metadata.name)

    async def suspend(self, name: str) -> CPTJob:
        """Asks a job to save and to give its pods back; `wait` for Condition.SUSPENDED."""
        return await self._patch(name, {"spec": {"suspend": True}})

    async def resume(self, name: str) -> CPTJob:
        """Lets a suspended job go on."""
        return await self._patch(name, {"spec": {"suspend": False}})

    async def delete(self, name: str) -> None:
        """Deletes a job. Its pods save and end; what is in its output stays."""
        await self._ask(
            name,
            lambda jobs, place: jobs.delete_namespaced_custom_object(
                **place, name=name, _request_timeout=_TIMEOUT
            ),
        )

    async def watch(self, name: str) -> AsyncGenerator[CPTJob]:
        """The job as it is now and after each change. Raises MissingInputError once it is gone."""
        while True:
            job = await self.get(name)
            yield job
            async with aclosing(self._changes(name, job.metadata.resource_version)) as changes:
                async for each in changes:
                    yield each

    async def progress(self, name: str) -> AsyncGenerator[TrainerStatus]:
        """What the trainer says of itself, each time that it says something else, until the job rests.

        Step, steps in all, percent, metrics, tokens/s; the operator reads them every half minute.
        Raises MissingInputError once the job is gone.
        """
        last: TrainerStatus | None = None
        async with aclosing(self.watch(name)) as states:
            async for job in states:
                said = job.status.trainer_status if job.status else None
                if said is not None and said != last:
                    last = said
                    yield said
                if any(is_true(job, each) for each in RESTS):
                    return

    async def wait(
        self,
        name: str,
        until: Condition | tuple[Condition, ...] = RESTS,
        seconds: float | None = None,
        see: Callable[[CPTJob], object] | None = None,
    ) -> CPTJob:
        """The job as soon as one of these conditions is true.

        seconds: for so long at most; None is for ever. see: is called with each state on the way.
        Raises TooLongError, and MissingInputError when the job is deleted meanwhile.
        """
        wanted = until if isinstance(until, tuple) else (until,)
        try:
            async with asyncio.timeout(seconds), aclosing(self.watch(name)) as states:
                async for job in states:
                    if see is not None:
                        see(job)
                    if any(is_true(job, each) for each in wanted):
                        return job
        except TimeoutError as error:
            words = " or ".join(wanted)
            raise TooLongError(f"job {name} is not {words} after {seconds:g} s") from error
        raise AssertionError("a watch ends by an error only")

    def logs(
        self, name: str, *, follow: bool = False, tail: int | None = None, pod: str | None = None
    ) -> AsyncGenerator[LogLine]:
        """What the job's pods say, of all ranks and of all attempts whose pods are still there.

        follow: goes on until the job has ended or is gone. tail: so many last lines of each pod.
        pod: one of them only: w1 is worker 1, in all attempts, and c0 the coordinator.
        """
        return (logs.follow if follow else logs.read)(self, name, tail, pod)

    async def call(self, request: Callable[[client.CoreV1Api], Awaitable[Any]]) -> Any:
        """Sends a request about pods. Raises MissingInputError where it finds none."""
        return await self._send(None, lambda api: request(client.CoreV1Api(api)))

    async def _changes(self, name: str, version: str | None) -> AsyncGenerator[CPTJob]:
        """Changes since `version`, for a while."""
        response = await self._ask(
            name,
            lambda jobs, place: jobs.list_namespaced_custom_object(
                **place,
                field_selector=f"metadata.name={name}",
                resource_version=version,
                timeout_seconds=_WATCH_SECONDS,
                watch=True,
                _preload_content=False,
                _request_timeout=_WATCH_TIMEOUT,
            ),
        )
        try:
            async for line in response.content:
                event = json.loads(line)
                if event["type"] in ("ERROR", "DELETED"):  # too long ago, or gone: read it again
                    return
                yield _job(event["object"])
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
            await asyncio.sleep(1)  # the connection was cut
        finally:
            response.close()

    async def _patch(self, name: str, change: Object) -> CPTJob:
        changed = await self._ask(
            name,
            lambda jobs, place: jobs.patch_namespaced_custom_object(
                **place,
                name=name,
                body=change,
                _content_type="application/merge-patch+json",
                _request_timeout=_TIMEOUT,
            ),
        )
        return _job(changed)

    async def _ask(
        self, name: str | None, request: Callable[[client.CustomObjectsApi, Object], Awaitable[Any]]
    ) -> Any:
        """Sends a request that is about the job `name`."""

        def send(api: client.ApiClient) -> Awaitable[Any]:
            place = {
                "group": GROUP,
                "version": VERSION,
                "plural": PLURAL,
                "namespace": self.namespace,
            }
            return request(client.CustomObjectsApi(api), place)

        return await self._send(name, send)

    async def _send(
        self,
        name: str | None,
        request: Callable[[client.ApiClient], Awaitable[Any]],
        again: bool = True,
    ) -> Any:
        """Sends a request; once more when credentials have expired."""
        if self._api is None:
            await self._connect()
        try:
            answer = await request(self._api)
            if isinstance(answer, aiohttp.ClientResponse) and not answer.ok:
                raise await _refused(answer)
            return answer
        except client.ApiException as error:
            if error.status == 401 and again:
                await self.close()
                return await self._send(name, request, again=False)
            raise self._explained(error, name) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            host = self._api.configuration.host if self._api else ""
            why = str(error) or type(error).__name__
            raise ClusterError(f"the API server at {host} cannot be reached: {why}") from error

    async def _connect(self) -> None:
        """Raises ClusterError when no cluster is configured."""
        settings = client.Configuration()
        if self._in_pod():
            config.load_incluster_config(client_configuration=settings)
            found = _OWN_NAMESPACE.read_text(encoding="utf-8").strip()
        else:
            self._find_kubeconfig()
            try:
                await config.load_kube_config(self._kubeconfig, self._context, settings)
                contexts, current = config.list_kube_config_contexts(self._kubeconfig)
            except (config.ConfigException, OSError) as error:
                raise ClusterError(f"no cluster is configured: {error}; {_CONFIGURE}") from error
            wanted = self._context or current["name"]
            chosen = next(each for each in contexts if each["name"] == wanted)
            found = chosen["context"].get("namespace") or "default"
        self._api = client.ApiClient(settings)
        self.namespace = self.namespace or found

    def _find_kubeconfig(self) -> None:
        """The library says of a missing file only that it lacks an entry."""
        default = os.environ.get("KUBECONFIG") or "~/.kube/config"
        paths = (self._kubeconfig or default).split(os.pathsep)
        if not any(Path(path).expanduser().is_file() for path in paths if path):
            missing = f"{os.pathsep.join(paths)} is not there"
            raise ClusterError(f"no cluster is configured: {missing}; {_CONFIGURE}")

    def _in_pod(self) -> bool:
        """A kubeconfig wins over the service account of the pod that this runs in."""
        given = self._kubeconfig or self._context or os.environ.get("KUBECONFIG")
        at_home = Path("~/.kube/config").expanduser().is_file()
        return not given and not at_home and _OWN_NAMESPACE.is_file()

    def _explained(self, error: client.ApiException, name: str | None) -> CPTJobError:
        said = _said(error)
        if error.status == 404:
            if said.get("details", {}).get("kind") == "pods":
                return MissingInputError(f"the pod {said['details'].get('name')} is gone")
            if name is not None and said.get("details", {}).get("name") == name:
                return MissingInputError(f"there is no job {name} in namespace {self.namespace}")
            return ClusterError(
                "the cluster knows no CPTJobs, or not this namespace; install the operator's chart"
            )
        if error.status == 409:
            return RefusedError(
                f"there is a job {name} in namespace {self.namespace} already; delete it first "
                f"(cptjob cancel {name}), or give this one another name"
            )
        message = str(said.get("message") or error.reason or error)
        return RefusedError(message) if error.status == 422 else ClusterError(message)


def _job(document: Object) -> CPTJob:
    return CPTJob.from_json(json.dumps(document))


async def _refused(answer: aiohttp.ClientResponse) -> client.ApiException:
    """What the library raises by itself, unless the answer is a stream."""
    error = client.ApiException(status=answer.status, reason=answer.reason)
    error.body = await answer.text()
    return error


def _said(error: client.ApiException) -> Object:
    """The Status object in an answer of the API server."""
    try:
        said = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
