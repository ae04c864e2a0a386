"""The cluster as a pass sees it and changes it: observe, report, apply."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cptjob_api.conditions import Reason
from cptjob_api.job import CPTJob, ObjectMeta
from cptjob_api.status import CPTJobStatus
from cptjob_operator.edge import cache, kinds, merge, parse
from cptjob_operator.edge.api import Api, Document
from cptjob_operator.edge.api_errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
)
from cptjob_operator.edge.events import Recorder
from cptjob_operator.edge.progress import Reports
from cptjob_operator.identity import JobId, JobKey, PodId, Role
from cptjob_operator.objects import placement
from cptjob_operator.observed import Child, Claim, Observed
from cptjob_operator.profile import Profile
from cptjob_operator.wanted import Deletion, Event, Wanted

log = logging.getLogger(__name__)

#: Requests of one job that are under way at once.
_AT_ONCE = 24
#: With many jobs at once, a status that is written later holds more.
BUSY_FACTOR = 5.0
#: A refused pod is not asked for again before this; then one is, and the others only after it.
REFUSED_SECONDS = 14.0
#: A job's children are looked at before its first pods are made when nobody did for so long.
#: A burst of jobs is over sooner, so it pays nothing for it.
CHILDREN_SECONDS = 120.0
#: How long what is read beside the watches (claims, other pods' GPUs) is taken for true.
_FRESH_SECONDS = 14.0
#: Nodes whose pods are read at once for one job.
_NODES_AT_ONCE = 4
#: Of a pool with more nodes that would do, the scheduler's words must be enough.
_NODES_AT_MOST = 100
_READ = 4096
#: Jobs that are kept parsed: several passes of a job often see the same version of it.
_PARSED = 256
_STATUS: TypeAdapter[CPTJobStatus | None] = TypeAdapter(CPTJobStatus | None)

T = TypeVar("T")


class Unreadable(Exception):
    """A job that the API server holds and this version cannot read. Holds it as a document."""

    def __init__(self, job: Document, cause: ValidationError) -> None:
        super().__init__(f"{cause.error_count()} faults")
        self.job, self.cause = job, cause


class Stale(Exception):
    """The job is newer than what the pass looked at; it has been read again."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    message: str
    until: float


class Cluster:
    """What a pass asks of the cluster.

    status_seconds: how long a status waits that nobody waits for. busy: whether passes wait for
    their turn; then such a status may wait BUSY_FACTOR times as long. clock: monotonic seconds.
    reported: is told each status that was written, with the one before.
    """

    def __init__(
        self,
        api: Api,
        known: cache.Cache,
        reports: Reports,
        recorder: Recorder,
        *,
        status_seconds: float = 1.0,
        busy: Callable[[], bool] = lambda: False,
        reported: Callable[[CPTJobStatus | None, CPTJobStatus], None] = lambda was, now: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._known, self._reports, self._recorder = api, known, reports, recorder
        self._status_seconds, self._busy = status_seconds, busy
        self._reported, self._clock = reported, clock
        self._parsed: OrderedDict[str, CPTJob] = OrderedDict()  # by uid
        self._held: dict[str, float] = {}  # uid of a job -> since when its counts wait
        self._refused: dict[str, dict[str, _Refusal]] = {}  # uid of a job -> by kind
        self._refused_extras: dict[str, dict[str, _Refusal]] = {}  # likewise
        self._stood: dict[str, float] = {}  # uid of a job -> when its children were last seen
        self._read: OrderedDict[tuple[str, str, str], tuple[float, asyncio.Future[Any]]]
        self._read = OrderedDict()
        self._may_list_pods = True

    # --- observe ---

    async def observe(self, key: JobKey) -> tuple[CPTJob, Observed] | None:
        """The job and what there is of it; None when there is no such job. Raises Unreadable."""
        entry = self._known.jobs.get(key)
        if entry is None:
            return None
        job = self._parse(entry)
        text = self._known.profile_of(entry.id)
        profile = Profile.from_json(text) if text is not None else None
        claims = await self._claims(job, profile)
        used = await self._used_gpus(job, self._looked_at(entry.id, job, profile))
        await self._last_words(job, entry.id)
        # From here on nothing waits, so that all parts are of one moment.
        pods, vanished = self._known.pods_of(entry.id)
        return job, Observed(
            pods=pods,
            vanished=vanished,
            children=self._known.children_of(entry.id),
            profile=profile,
            used_gpus=used,
            nodes=MappingProxyType(self._known.nodes),
            claims=claims,
            report=self._reports.get(entry.uid),
            refused={kind: each.message for kind, each in self._refused.get(entry.uid, {}).items()},
        )

    async def _last_words(self, job: CPTJob, id: JobId) -> None:
        """Asks a coordinator that is about to go, as the last of a suspended job, what was saved."""
        if not job.spec.suspend:
            return
        pods, _ = self._known.pods_of(id)
        active = [pod for pod in pods if pod.active]
        if len(active) == 1 and active[0].role is Role.COORDINATOR and active[0].deleting is None:
            await self._reports.ask(active[0])

    def _parse(self, entry: cache.Job) -> CPTJob:
        known = self._parsed.get(entry.uid)
        if known is not None and known.metadata.resource_version == str(entry.version):
            return known
        try:
            if known is not None and known.metadata.generation == entry.generation:
                # The spec is the one that was read and judged before.
                job = known.model_copy(
                    update={
                        "metadata": ObjectMeta.from_json(entry.parts.metadata),
                        "status": _STATUS.validate_json(
                            entry.parts.status, by_alias=True, by_name=False
                        ),
                    }
                )
            else:
                job = CPTJob.from_json(entry.parts.whole)
        except ValidationError as error:
            raise Unreadable(cache.document(entry), error) from error
        self._parsed[entry.uid] = job
        self._parsed.move_to_end(entry.uid)
        if len(self._parsed) > _PARSED:
            self._parsed.popitem(last=False)
        return job

    async def _claims(self, job: CPTJob, profile: Profile | None) -> Mapping[str, Claim] | None:
        """The job's claims, where pods are about to need them."""
        phase = job.status.phase if job.status else None
        if profile is None or phase in ("Complete", "Failed"):
            return None
        if phase == "Running" and (job.spec.trainer.num_nodes > 1 or self._both_are_up(job)):
            return None
        namespace = job.metadata.namespace or ""
        found: dict[str, Claim] = {}
        for mount in profile.mounts:
            claim = await self._fresh(
                ("claim", namespace, mount.claim),
                partial(self._claim, namespace, mount.claim),
            )
            if claim is not None:
                found[mount.claim] = claim
        return found

    def _both_are_up(self, job: CPTJob) -> bool:
        """The coordinator and its only worker: neither is about to be made."""
        pods, _ = self._known.pods_of(_id(job))
        return sum(pod.ready and pod.deleting is None for pod in pods) >= 2

    async def _claim(self, namespace: str, name: str) -> Claim | None:
        try:
            return parse.claim(await self._api.get(kinds.CLAIM, namespace, name))
        except NotFound:
            return None

    def _looked_at(self, id: JobId, job: CPTJob, profile: Profile | None) -> Collection[str]:
        """Nodes whose free GPUs are counted: those that the job names before its pods are made;
        else those that would do, once the scheduler finds none."""
        phase = job.status.phase if job.status else None
        if phase in ("Running", "Complete", "Failed"):
            return ()
        if job.spec.scheduling.mode == "Manual":
            return job.spec.scheduling.node_names
        pods, _ = self._known.pods_of(id)
        if profile is None or not any(pod.unschedulable for pod in pods if pod.role is Role.WORKER):
            return ()
        fit = placement.fitting(profile, self._known.nodes)
        return fit if profile.gpus_per_node and len(fit) <= _NODES_AT_MOST else ()

    async def _used_gpus(self, job: CPTJob, names: Collection[str]) -> Mapping[str, int] | None:
        """GPUs that pods of others hold on these nodes; None where nobody looks.

        In namespaced mode nobody may look; it takes a new role to change that.
        """
        uid, priority = job.metadata.uid, job.spec.scheduling.priority_class_name
        found: dict[str, int] = {}

        async def read(name: str) -> bool:
            if self._may_list_pods:
                try:
                    holders = await self._fresh(("gpus", "", name), partial(self._holders, name))
                    found[name] = sum(each.gpus for each in holders if each.stays(uid, priority))
                except Forbidden:
                    self._may_list_pods = False
            return self._may_list_pods

        await _each(names, read, _NODES_AT_ONCE)
        return found if names and self._may_list_pods else None

    async def _holders(self, node: str) -> list[parse.Holder]:
        found: list[parse.Holder] = []
        async for page in self._api.pages(kinds.POD, fields=f"spec.nodeName={node}"):
            found += filter(None, map(parse.holder, page.items))
        return found

    async def _fresh(self, what: tuple[str, str, str], read: Callable[[], Awaitable[T]]) -> T:
        """The answer of `read`, or the one that it gave a moment ago, or is about to give."""
        since, known = self._read.get(what, (-math.inf, None))
        if known is None or self._clock() - since >= _FRESH_SECONDS or _failed(known):
            known = asyncio.ensure_future(read())
            self._read[what] = self._clock(), known
            self._read.move_to_end(what)
            if len(self._read) > _READ:
                self._read.popitem(last=False)
        value: T = await asyncio.shield(known)
        return value

    # --- report ---

    async def report(self, job: CPTJob, wanted: Wanted) -> float | None:
        """Writes the status if it reads otherwise. Returns the seconds that it may wait, if it may.

        Raises Stale when the job has changed since it was observed.
        """
        uid = job.metadata.uid or ""
        if wanted.status is None:
            self._held.pop(uid, None)
            return None
        before = (
            job.status.model_dump(mode="json", exclude_none=True, exclude_unset=True)
            if job.status
            else {}
        )
        patch = merge.patch(before, wanted.status.model_dump(mode="json", exclude_none=True))
        if not patch:
            self._held.pop(uid, None)
            return None
        if not wanted.urgent:
            since = self._held.setdefault(uid, self._clock())
            patience = self._status_seconds * (BUSY_FACTOR if self._busy() else 1.0)
            left = since + patience - self._clock()
            if left > 0.0:
                return left
        self._held.pop(uid, None)
        await self.patch_status(_key(job), uid, job.metadata.resource_version or "", patch)
        self._reported(job.status, wanted.status)
        return None

    async def patch_status(
        self, key: JobKey, uid: str, version: str, patch: Mapping[str, Any]
    ) -> None:
        """Merges `patch` into the status of that version of the job. Raises Stale."""
        try:
            answer = await self._api.patch_status(
                kinds.JOB, key.namespace, key.name, patch, version, uid
            )
        except Conflict as error:
            await self._read_again(key)
            raise Stale(f"{key} has changed") from error
        except NotFound as error:
            self._known.drop_job(key, uid)
            raise Stale(f"{key} is gone") from error
        self._known.put_job(answer, own=True)

    async def _read_again(self, key: JobKey) -> None:
        try:
            self._known.put_job(await self._api.get(kinds.JOB, key.namespace, key.name))
        except NotFound:
            entry = self._known.jobs.get(key)
            if entry is not None:
                self._known.drop_job(key, entry.uid)

    # --- apply ---

    async def apply(self, job: CPTJob, wanted: Wanted) -> bool:
        """Deletes and makes what is wanted. True when anything was asked of the API server.

        What the API server refuses is kept for the next pass. Raises the first other error, after
        everything else was tried.
        """
        uid = job.metadata.uid or ""
        if any(each["kind"] == "Pod" for each in wanted.objects):
            self._permit_others(uid, wanted.objects)
        refused = self._refused.get(uid, {})
        objects = [
            each
            for each in wanted.objects
            if each["kind"] != "Pod" and not self._too_soon(refused.get(each["kind"]))
        ]
        pods = [each for each in wanted.objects if each["kind"] == "Pod"]
        await _each(wanted.deletions, lambda each: self._delete(job, each))
        await _each(objects, lambda each: self._make_child(job, each))
        # Pods without their own configuration and fence would run with somebody's, or with none.
        whole = self._refused.get(uid, {}).keys() <= {kinds.POD.name}
        whole = whole and await self._children_stand(job, pods)
        made = whole and await self._make_pods(job, pods)
        refused = self._refused_extras.get(uid, {})
        extras = [each for each in wanted.extras if not self._too_soon(refused.get(each["kind"]))]
        await _each(extras, lambda each: self._make_extra(job, each))
        return bool(wanted.deletions or objects or made or extras)

    def tell_of(self, key: JobKey, uid: str, event: Event) -> None:
        """An Event on the job. It is sent in the background: none is worth a wait."""
        self._recorder.tell(key, uid, event)

    def seen(self, job: CPTJob, observed: Observed) -> None:
        """Everything that follows from `observed` is done."""
        self._known.seen(_id(job), observed.pods)

    def version(self, key: JobKey) -> str | None:
        """resourceVersion of the job, as far as it is known."""
        entry = self._known.jobs.get(key)
        return str(entry.version) if entry else None

    def forget(self, uid: str) -> None:
        """The job is gone."""
        self._parsed.pop(uid, None)
        self._held.pop(uid, None)
        self._refused.pop(uid, None)
        self._refused_extras.pop(uid, None)
        self._stood.pop(uid, None)
        self._reports.forget(uid)
        self._recorder.forget(uid)

    async def _delete(self, job: CPTJob, what: Deletion) -> None:
        kind, namespace = kinds.kind(what.kind), job.metadata.namespace or ""
        log.info("deleting %s %s: %s", what.kind, what.name, what.why)
        if kind is kinds.POD:
            self._known.asked_to_go(what.uid)
        try:
            answer = await self._api.delete(
                kind, namespace, what.name, what.uid, what.grace_seconds
            )
        except Conflict:
            # Another object of that name; or something else was in the way of this one.
            if await self._uid_of(kind, namespace, what.name) == what.uid:
                raise
            self._was_gone(job, kind, what)
            return
        except NotFound:
            self._was_gone(job, kind, what)
            return
        if kind is kinds.POD and answer.get("kind") == "Pod":
            self._known.put_pod(answer, own=True)

    async def delete_job(self, key: JobKey, uid: str) -> None:
        """Deletes the job of that uid, which cannot be read as one."""
        try:
            await self._api.delete(kinds.JOB, key.namespace, key.name, uid)
        except (Conflict, NotFound):
            self._known.drop_job(key, uid)

    async def _uid_of(self, kind: kinds.Kind, namespace: str, name: str) -> str | None:
        try:
            return str((await self._api.get(kind, namespace, name))["metadata"]["uid"])
        except NotFound:
            return None

    def _was_gone(self, job: CPTJob, kind: kinds.Kind, what: Deletion) -> None:
        """No such object, or another of that name."""
        if kind is kinds.POD:
            self._known.lost_pod(_id(job), what.uid)
        else:
            self._known.drop_job(_key(job), what.uid)

    async def _make_child(self, job: CPTJob, manifest: Document) -> None:
        uid, kind = job.metadata.uid or "", kinds.kind_of(manifest)
        refusal = await self._put_child(job, kind, manifest)
        if refusal is None:
            self._stood[uid] = self._clock()
            self._permit(uid, kind)
        elif refusal:
            self._refuse(job, kind, refusal)

    async def _make_extra(self, job: CPTJob, manifest: Document) -> None:
        """Makes what pods can do without. That it is refused is told by an Event, and no more."""
        uid, kind = job.metadata.uid or "", kinds.kind_of(manifest)
        refusal = await self._put_child(job, kind, manifest)
        refused = self._refused_extras.setdefault(uid, {})
        refused.pop(kind.name, None)
        if refusal:
            refused[kind.name] = _Refusal(refusal, self._clock() + REFUSED_SECONDS)
            name = manifest["metadata"]["name"]
            message = f"{kind.name} {name} refused: {refusal}; the job goes on without it"
            self.tell_of(_key(job), uid, Event("Warning", Reason.REFUSED, message))

    async def _put_child(self, job: CPTJob, kind: kinds.Kind, manifest: Document) -> str | None:
        """Makes it, or brings it back to what it should be.

        Returns None once it is there; else why it is refused, "" where everything is about to go.
        """
        namespace, name = job.metadata.namespace or "", manifest["metadata"]["name"]
        uid = job.metadata.uid or ""
        known = self._known.children_of(_id(job))
        ours = (kind.name, name, uid) in ((each.kind, each.name, each.owner_uid) for each in known)
        try:
            put = self._api.apply if ours else self._api.post
            answer = await put(kind, namespace, manifest)
        except AlreadyExists:
            answer = await self._api.get(kind, namespace, name)
            if parse.owner_uid(answer) != uid:
                return _foreign(kind, name)
        except (Forbidden, Invalid) as error:
            return "" if _terminating(error) else str(error)
        except NotFound:
            return ""  # the namespace is gone, and the job with it
        self._known.put_child(kind.name, answer)
        return None

    async def _children_stand(self, job: CPTJob, pods: list[Document]) -> bool:
        """False when a child that pods need was deleted meanwhile: the next pass makes it anew.

        Nobody watches the children of jobs. They are read before pods that replace others are
        made, and before pods of a job whose children nobody has seen for long.
        """
        id = _id(job)
        seen = self._stood.get(id.uid, -math.inf)
        fresh = self._clock() - seen < CHILDREN_SECONDS
        if not pods or (fresh and not any(map(_replaces, pods))):
            return True
        known = self._known.children_of(id)
        await _each(known, lambda each: self._look_at_child(id, each))
        if len(self._known.children_of(id)) < len(known):
            self._known.changed(_key(job), 0.0)
            return False
        self._stood[id.uid] = self._clock()
        return True

    async def _look_at_child(self, id: JobId, child: Child) -> None:
        kind = kinds.kind(child.kind)
        if await self._uid_of(kind, id.namespace, child.name) != child.uid:
            self._known.drop_child(id, child)

    async def _make_pods(self, job: CPTJob, manifests: list[Document]) -> bool:
        """True when any was asked for. After a refusal one is tried, and the others after it."""
        uid = job.metadata.uid or ""
        refusal = self._refused.get(uid, {}).get(kinds.POD.name)
        if refusal is not None:
            if manifests and self._too_soon(refusal):
                return False
            if manifests and not await self._make_pod(job, manifests[0]):
                return False
            # Only here: of pods that are asked for side by side, one may be let in after another
            # was refused.
            self._permit(uid, kinds.POD)
            manifests = manifests[1:]
        await _each(manifests, lambda each: self._make_pod(job, each))
        return bool(manifests)

    async def _make_pod(self, job: CPTJob, manifest: Document) -> bool:
        """False when the API server refuses it, and so would refuse others."""
        namespace, name = job.metadata.namespace or "", manifest["metadata"]["name"]
        uid = job.metadata.uid or ""
        try:
            answer = await self._api.post(kinds.POD, namespace, manifest)
        except AlreadyExists:
            answer = await self._api.get(kinds.POD, namespace, name)
            if parse.owner_uid(answer) != uid:
                self._refuse(job, kinds.POD, _foreign(kinds.POD, name))
                return False
        except (Forbidden, Invalid) as error:
            if not _terminating(error):
                self._refuse(job, kinds.POD, str(error))
            return False
        except NotFound:
            return False
        self._known.put_pod(answer, own=True)
        return True

    def _refuse(self, job: CPTJob, kind: kinds.Kind, message: str) -> None:
        uid = job.metadata.uid or ""
        refusal = _Refusal(message, self._clock() + REFUSED_SECONDS)
        self._refused.setdefault(uid, {})[kind.name] = refusal
        log.warning("%s refused: %s", kind.name, message)

    def _too_soon(self, refusal: _Refusal | None) -> bool:
        """What was refused a moment ago is not asked for again yet."""
        return refusal is not None and self._clock() < refusal.until

    def _permit_others(self, uid: str, wanted: Iterable[Document]) -> None:
        """What was refused and is no longer missing has been made by another request, or operator."""
        missing = {each["kind"] for each in wanted}
        for kind in kinds.CHILDREN:
            if kind.name not in missing:
                self._permit(uid, kind)

    def _permit(self, uid: str, kind: kinds.Kind) -> None:
        refused = self._refused.get(uid)
        if refused is not None:
            refused.pop(kind.name, None)
            if not refused:
                del self._refused[uid]


def _key(job: CPTJob) -> JobKey:
    return JobKey(job.metadata.namespace or "", job.metadata.name)


def _id(job: CPTJob) -> JobId:
    return JobId(job.metadata.namespace or "", job.metadata.uid or "")


def _replaces(pod: Document) -> bool:
    """Whether a pod of that place has been there before."""
    identity = PodId.of(pod["metadata"].get("labels") or {})
    return identity is not None and (identity.attempt, identity.incarnation) != (0, 0)


def _failed(answer: asyncio.Future[Any]) -> bool:
    return answer.done() and (answer.cancelled() or answer.exception() is not None)


def _foreign(kind: kinds.Kind, name: str) -> str:
    return (
        f"there is a {kind.name} {name} that does not belong to this job; delete or rename it, "
        "or give the job another name"
    )


def _terminating(error: ApiError) -> bool:
    return isinstance(error, Forbidden) and error.terminating


async def _each(
    items: Iterable[T], do: Callable[[T], Awaitable[object]], at_once: int = _AT_ONCE
) -> None:
    """Does it for all, some at once, in their order; stops when one returns False.

    Raises the first ApiError after all others were tried.
    """
    known = list(items)
    waiting = iter(known)
    errors: list[ApiError] = []
    stopped = False

    async def work() -> None:
        nonlocal stopped
        for each in waiting:
            try:
                stopped = await do(each) is False or stopped
            except ApiError as error:
                errors.append(error)
            if stopped:
                return

    if len(known) == 1:
        await work()
    elif known:
        await asyncio.gather(*(work() for _ in range(min(at_once, len(known)))))
    if errors:
        raise errors[0]
