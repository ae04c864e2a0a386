"""The torchx scheduler `cptjob`: `torchx run -s cptjob`, `status`, `log`, `cancel`, `list`.

A CPTJob is made of a manifest, which the component `cptjob.train` takes. An application of torchx is
a description of pods, and those of a CPTJob are the operator's: no other component is accepted.
"""

import contextlib
import functools
import re
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from torchx.runner import config
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream
from torchx.specs import AppDef, AppDryRunInfo, AppState, ReplicaStatus, RoleStatus, runopts

from cptjob import jobs, standing
from cptjob.client import Client
from cptjob.logs import ROLES, LogLine
from cptjob.standing import is_true
from cptjob.torchx_component import MANIFEST, roles, told
from cptjob_api.conditions import Condition
from cptjob_api.job import CPTJob
from cptjob_api.manifest import parse_manifest
from cptjob_trainer.errors import ConfigError, MissingInputError, UsageError

NAME = "cptjob"


@dataclass(frozen=True)
class Place:
    """Which cluster and namespace; None is kubectl's choice."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None

    @staticmethod
    def of(options: Mapping[str, Any]) -> "Place":
        """As the scheduler's options name it."""
        return Place(*(options.get(key) for key in ("namespace", "context", "kubeconfig")))


@dataclass(frozen=True)
class Request:
    """What is sent, and where."""

    job: CPTJob
    place: Place


class CPTJobScheduler(Scheduler):  # type: ignore[misc]
    """CPTJobs as torchx's applications. An application's id is NAMESPACE:NAME."""

    def __init__(self, session_name: str) -> None:
        super().__init__(NAME, session_name)
        self._places: dict[str, Place] = {}
        self._clients: dict[Place, Client] = {}
        self._lock = threading.Lock()  # `torchx log` has a thread for each pod
        self._open = contextlib.ExitStack()
        # Not all of torchx's commands call close().
        weakref.finalize(self, self._open.close)

    def close(self) -> None:
        """Ends the connections."""
        self._clients.clear()
        self._open.close()

    def _run_opts(self) -> runopts:
        options = runopts()
        options.add("namespace", type_=str, help="By default the manifest's, or the context's.")
        options.add("context", type_=str, help="Of the kubeconfig; by default the current one.")
        options.add("kubeconfig", type_=str, help="By default $KUBECONFIG, ~/.kube/config.")
        return options

    def _validate(self, app: AppDef, scheduler: str) -> None:
        """Roles need no resources: the manifest says what a worker needs."""

    def _submit_dryrun(self, app: AppDef, cfg: Mapping[str, Any]) -> AppDryRunInfo:
        with told():
            place = Place.of(cfg)
            job = _job(app)
            namespace = jobs.namespace(job, place.namespace)
        metadata = job.metadata.model_copy(update={"namespace": namespace})
        request = Request(
            job.model_copy(update={"metadata": metadata}), replace(place, namespace=namespace)
        )
        return AppDryRunInfo(request, lambda request: request.job.yaml())

    def schedule(self, dryrun_info: AppDryRunInfo) -> str:
        """Gives the job to the cluster."""
        request: Request = dryrun_info.request
        with told():
            client = self._client(request.place)
            made = client.create(request.job)
        app_id = _app_id(client, made)
        self._places[app_id] = request.place
        return app_id

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """How a job stands; None when there is none of that name."""
        with told():
            client, name = self._find(app_id)
            try:
                job = client.get(name)
            except MissingInputError:
                return None
        return DescribeAppResponse(
            app_id=app_id,
            state=state(job),
            num_restarts=job.status.restarts if job.status else 0,
            msg=standing.page(job),
            roles_statuses=_role_statuses(job),
            roles=roles(job),
        )

    def list(self) -> "list[ListAppResponse]":
        """All jobs of the namespace."""
        with told():
            client = self._client(self._configured)
            found = client.list()
        return [ListAppResponse(_app_id(client, job), state(job)) for job in found]

    def _cancel_existing(self, app_id: str) -> None:
        with told():
            client, name = self._find(app_id)
            client.delete(name)

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """What a pod says, and those before it in its place that are still there."""
        with told():
            if role_name not in ROLES:
                raise UsageError(f"there is no role {role_name}; roles: {', '.join(ROLES)}")
            if streams not in (None, Stream.COMBINED):
                raise UsageError("a pod's log is one stream: leave out --streams")
            chosen = _pattern(regex)
            client, name = self._find(app_id)
            said = client.logs(name, follow=should_tail, pod=f"{role_name[0]}{k}")
            for line in said:
                if _is_between(line, since, until) and chosen.search(line.text):
                    yield f"{line.text}\n"

    @functools.cached_property
    def _configured(self) -> Place:
        """Most commands of torchx take no options, but all have its configuration file."""
        options: dict[str, Any] = {}
        config.apply(NAME, options)
        return Place.of(options)

    def _find(self, app_id: str) -> tuple[Client, str]:
        """Where a job is, and its name."""
        namespace, _, name = app_id.rpartition(":")
        place = self._places.get(app_id) or self._configured
        return self._client(replace(place, namespace=namespace or place.namespace)), name

    def _client(self, place: Place) -> Client:
        with self._lock:
            if place not in self._clients:
                made = Client(place.namespace, context=place.context, kubeconfig=place.kubeconfig)
                self._clients[place] = self._open.enter_context(made)
            return self._clients[place]


def create_scheduler(session_name: str, **_options: object) -> CPTJobScheduler:
    """What torchx calls. The options are what any of its schedulers may be made with."""
    return CPTJobScheduler(session_name)


def state(job: CPTJob) -> AppState:
    """torchx's word for it. A job that is suspended, or cannot go on without a change, is pending."""
    said = (
        (is_true(job, Condition.COMPLETE), AppState.SUCCEEDED),
        (is_true(job, Condition.FAILED), AppState.FAILED),
        (job.metadata.deletion_timestamp is not None, AppState.CANCELLED),
        (is_true(job, Condition.RUNNING), AppState.RUNNING),
        (job.status is None, AppState.SUBMITTED),
    )
    return next((state for holds, state in said if holds), AppState.PENDING)


def _job(app: AppDef) -> CPTJob:
    """The job of an application of the component. Raises ConfigError for any other."""
    text = app.metadata.get(MANIFEST)
    if text is None:
        raise ConfigError(
            f"{app.name} has no manifest, which a CPTJob is made of; use the component: "
            "torchx run -s cptjob cptjob.train --manifest FILE, or another scheduler (-s local_cwd)"
        )
    return jobs.check(parse_manifest(text, MANIFEST))


def _app_id(client: Client, job: CPTJob) -> str:
    return f"{client.namespace}:{job.metadata.name}"


def _role_statuses(job: CPTJob) -> list[RoleStatus]:
    """Workers by the rank of their node, as soon as they have told their ranks."""
    resolved = job.status.resolved if job.status else None
    size = resolved.num_proc_per_node if resolved else None
    if job.status is None or not size:
        return []
    ranks = {rank // size: node.name for node in job.status.nodes for rank in node.ranks}
    replicas = [ReplicaStatus(each, state(job), "worker", ranks[each]) for each in sorted(ranks)]
    return [RoleStatus("worker", replicas)]


def _pattern(regex: str | None) -> re.Pattern[str]:
    try:
        return re.compile(regex or "")
    except re.error as error:
        raise UsageError(f"{regex} is no regular expression: {error}") from error


def _is_between(line: LogLine, since: datetime | None, until: datetime | None) -> bool:
    if since is None and until is None:
        return True
    said = datetime.fromisoformat(line.time).timestamp()
    early = since is not None and said < since.timestamp()
    late = until is not None and said > until.timestamp()
    return not early and not late
