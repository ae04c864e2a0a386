"""The operator's parts, put together."""

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import kopf

from cptjob_operator import handlers
from cptjob_operator.edge import kinds
from cptjob_operator.edge.api import Api, Bucket
from cptjob_operator.edge.api_errors import ApiError, Forbidden
from cptjob_operator.edge.cache import Cache
from cptjob_operator.edge.cluster import Cluster
from cptjob_operator.edge.events import Recorder
from cptjob_operator.edge.freshness import Freshness
from cptjob_operator.edge.leader import Leader
from cptjob_operator.edge.listing import Lister
from cptjob_operator.edge.login import Login
from cptjob_operator.edge.progress import Puller, Reports
from cptjob_operator.identity import MANAGER, JobKey
from cptjob_operator.metrics import Metrics, State
from cptjob_operator.queue import Queue
from cptjob_operator.reconciler import Plan, Reconciler
from cptjob_operator.serving import Probes, serve
from cptjob_operator.settings import Settings

log = logging.getLogger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RETRY_SECONDS = 2.0
_JUST_NOW_SECONDS = 3.0
#: How often to look for namespaces that may be looked into now, or no longer; and for how often.
_ALLOWED_SECONDS = 60.0
_SURE = 2
_WATCHED = (kinds.JOB, kinds.POD, kinds.NODE)


class Operator:
    """Everything that runs in this process."""

    def __init__(self, settings: Settings, plan: Plan, namespace: str = "") -> None:
        """`namespace`: of the lease; the pod's own when it is not given."""
        self.settings = settings
        self.login = Login()
        self.metrics = Metrics()
        self.identity = own_identity()
        self._stop = asyncio.Event()
        self.queue = Queue()
        self.cache = Cache(self._changed)
        self._plain = Api(self.login, manager=MANAGER, watch=self.metrics.called, connections=2)
        self.leader = Leader(
            self._plain,
            namespace or own_namespace(),
            self.identity,
            name=settings.leader.name,
            lease_seconds=settings.leader.lease_seconds,
            renew_seconds=settings.leader.renew_seconds,
        )
        writes = settings.timing.writes
        self.api = Api(
            self.login,
            manager=MANAGER,
            bucket=Bucket(writes.per_second, writes.burst),
            may_write=self.leader.leads,
            watch=self.metrics.called,
        )
        self.reports = Reports()
        self.recorder = Recorder(self.api, self.identity)
        self.cluster = Cluster(
            self.api,
            self.cache,
            self.reports,
            self.recorder,
            status_seconds=settings.timing.status_seconds,
            busy=lambda: self.queue.depth() > 0,
            reported=self.metrics.reported,
        )
        self.reconciler = Reconciler(
            self.cluster, plan, settings, self.metrics, gone=self.queue.forget
        )
        self._look_after(settings.watched_namespaces)
        self.metrics.registry.register(
            State(self.cache, self.queue, self.leader.leads, lambda: self.freshness.ages())
        )

    def _look_after(self, namespaces: tuple[str, ...]) -> None:
        """Of `namespaces`; none means all."""
        self.namespaces = namespaces
        seconds = self.settings.timing.resync_seconds
        self.lister = Lister(self.api, self.cache, namespaces, seconds)
        self.freshness = Freshness(_WATCHED, namespaces, self.lister.soon)

    async def run(self) -> None:
        """Until the process is asked to end. Raises what no part can live without."""
        probes = Probes(self._sick, self._unready)
        serving = self.settings.serving
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        parts: list[Coroutine[Any, Any, object]] = [
            self._stop.wait(),
            serve(probes, self.metrics.text, serving.probe_port, serving.metrics_port),
            self._work(),
        ]
        try:
            await _until_one_ends(parts)
        finally:
            await self.api.close()
            await self._plain.close()

    async def _work(self) -> None:
        self._look_after(await self._wait_for_kind())
        await self.lister.sync()
        await _until_one_ends(
            [
                self._watch(),
                self.lister.run(),
                self.leader.run(self._act),
                self._until_others_are_allowed(),
            ]
        )

    async def _watch(self) -> None:
        ours = asyncio.all_tasks()
        namespaces = self.namespaces
        tasks = await kopf.spawn_tasks(
            registry=handlers.registry(self.cache, self.login, self.freshness),
            settings=handlers.settings(),
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
        # kopf's own way to end would wait some seconds for tasks that are not its own.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await kopf.run_tasks(tasks, ignored=ours)

    async def _act(self) -> None:
        """What only the leader does."""
        # Nobody watches the children of jobs, and another operator may have made some.
        await self.lister.sync(unless_seconds=_JUST_NOW_SECONDS)
        for key in list(self.cache.jobs):
            self.queue.add(key)
        await _until_one_ends(
            [
                self.queue.run(self.reconciler.reconcile),
                self.recorder.run(),
                self._puller().run(),
            ]
        )

    def _changed(self, key: JobKey, seconds: float) -> None:
        """A job may need a pass. One that goes while another operator leads gets none."""
        if key in self.cache.jobs or self.leader.leads():
            self.queue.add(key, seconds)
        else:
            self.reconciler.forget(key)

    def _puller(self) -> Puller:
        return Puller(
            self.cache,
            self.reports,
            self.queue.add,
            seconds=self.settings.timing.progress_seconds,
            outcome=lambda word: self.metrics.pulls.labels(word).inc(),
        )

    async def _wait_for_kind(self) -> tuple[str, ...]:
        """Namespaces to look after. kopf looks once for the kinds that it is to watch."""
        told = False
        while True:
            try:
                allowed = await self._allowed()
                others = set(self.settings.watched_namespaces) - {*allowed}
                if others:
                    log.warning("no rights in, so not looked after: %s", ", ".join(sorted(others)))
                return allowed
            except ApiError as error:
                if not told:
                    log.warning("waiting for the API of CPTJobs: %s", error)
                told = True
            await asyncio.sleep(_RETRY_SECONDS)

    async def _allowed(self) -> tuple[str, ...]:
        """Watched namespaces that may be looked into. Raises ApiError when that is none.

        The rights in a namespace go when it is deleted: the others are looked after all the same.
        """
        watched = self.settings.watched_namespaces
        found: list[str] = []
        refused: Forbidden | None = None
        for namespace in watched or (None,):
            try:
                async for _ in self.api.pages(kinds.JOB, namespace, fields=_NONE):
                    pass
            except Forbidden as error:
                refused = error
            else:
                found += [namespace] if namespace else []
        if refused is not None and not found:
            raise refused
        return tuple(found)

    async def _until_others_are_allowed(self) -> None:
        """Returns when other namespaces may be looked into: they are watched after a new start."""
        times = 0  # rights may be missing for a moment, while they are written anew
        while times < _SURE:
            await asyncio.sleep(_ALLOWED_SECONDS)
            try:
                others = bool(self.namespaces) and await self._allowed() != self.namespaces
            except ApiError:
                others = False
            times = times + 1 if others else 0
        log.warning("other namespaces may be looked into than before: starting anew")

    def _sick(self) -> str:
        age = self.freshness.age()
        # Once everything was listed every watch is due: one that never began is dead as well.
        if self.lister.synced and age > handlers.DEAD_AFTER_SECONDS:
            return f"a watch was not heard of for {age:.0f} s"
        return ""

    def _unready(self) -> str:
        if not self.lister.synced:
            return "what there is was not listed yet"
        return "" if self.freshness.begun else "not everything is watched yet"


_NONE = "metadata.name=none"


def own_identity() -> str:
    """Who holds the lease. A container that is started anew in its pod is the same one."""
    pod, uid = os.environ.get("POD_NAME"), os.environ.get("POD_UID")
    return f"{pod}_{uid}" if pod and uid else f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


def own_namespace() -> str:
    """The namespace that this pod is in."""
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return os.environ.get("POD_NAMESPACE") or "default"


async def _until_one_ends(parts: Sequence[Coroutine[Any, Any, object]]) -> None:
    """Runs all; when one ends, or fails, the others are cancelled. Raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
