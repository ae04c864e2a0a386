"""One pass over one job: observe, plan, report, apply. Every cause runs the same."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.faults import explain
from cptjob_api.fields import show
from cptjob_api.job import CPTJob
from cptjob_operator import logs
from cptjob_operator.edge.api import Document
from cptjob_operator.edge.api_errors import ApiError, NotLeader
from cptjob_operator.edge.cluster import Cluster, Stale, Unreadable
from cptjob_operator.identity import MANAGER, JobKey
from cptjob_operator.metrics import Metrics
from cptjob_operator.observed import Observed, parse_time
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Event, Wanted

log = logging.getLogger(__name__)

Plan = Callable[[CPTJob, Observed, Settings, datetime], Wanted]

#: After a pass that changed something comes another, as what it did may call for more.
_FOLLOW_UP_SECONDS = 0.5
_AT_ONCE_SECONDS = 0.02
#: A lease that was late may be renewed; whoever takes it from us looks at every job anyway.
_NOT_LEADER_SECONDS = 5.0
_MESSAGE_CHARACTERS = 1000
_NEVER = datetime.max.replace(tzinfo=UTC)


class Reconciler:
    """Runs passes. `gone` is told each job that is no longer there."""

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        settings: Settings,
        metrics: Metrics,
        gone: Callable[[JobKey], None] = lambda key: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._plan, self._settings = cluster, plan, settings
        self._metrics, self._gone, self._now = metrics, gone, now
        self._uids: dict[JobKey, str] = {}

    async def reconcile(self, key: JobKey) -> float | None:
        """One pass. Returns the seconds until the next one; raises what calls for a back-off."""
        begun, outcome = time.perf_counter(), "error"
        with logs.about(key):
            try:
                outcome, again = await self._pass(key)
            except Stale:
                outcome, again = "stale", _AT_ONCE_SECONDS
            except NotLeader:
                outcome, again = "not leader", _NOT_LEADER_SECONDS
            except ApiError as error:
                log.warning("the API server: %s", error)
                raise
            except Exception:
                log.exception("a fault of the operator; the job is tried again later")
                self._fault(key)
                raise
            finally:
                self._metrics.passes.labels(outcome).observe(time.perf_counter() - begun)
        return again

    async def _pass(self, key: JobKey) -> tuple[str, float | None]:
        try:
            looked = await self._cluster.observe(key)
        except Unreadable as error:
            return await self._stall(key, error)
        if looked is None:
            self.forget(key)
            return "gone", None
        job, observed = looked
        self._remember(key, job)
        now = self._now()
        wanted = self._plan(job, observed, self._settings, now)
        version = job.metadata.resource_version
        waits = await self._cluster.report(job, wanted)
        if waits is None:
            # What the status says now. No later pass finds it new, so a failed write below must
            # not keep it back.
            self._tell(key, job, wanted)
        changed = await self._cluster.apply(job, wanted)
        self._cluster.seen(job, observed)
        changed = changed or self._cluster.version(key) != version
        due = [waits, _FOLLOW_UP_SECONDS if changed else None]
        if wanted.again is not None:
            due.append(max((wanted.again - self._now()).total_seconds(), _AT_ONCE_SECONDS))
        again = min((each for each in due if each is not None), default=None)
        return ("changed" if changed else "unchanged"), again

    def _tell(self, key: JobKey, job: CPTJob, wanted: Wanted) -> None:
        for event in wanted.events:
            self._cluster.tell_of(key, job.metadata.uid or "", event)
        for cause in wanted.restarts:
            self._metrics.restarts.labels(cause).inc()

    def _remember(self, key: JobKey, job: CPTJob) -> None:
        uid = job.metadata.uid or ""
        before = self._uids.get(key)
        if before not in (None, uid):
            self._cluster.forget(before)
        self._uids[key] = uid
        attempt = job.status.attempt if job.status else 0
        logs.add(generation=job.metadata.generation or 0, attempt=attempt)

    def forget(self, key: JobKey) -> None:
        """The job is gone."""
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._cluster.forget(uid)
        self._gone(key)

    def _fault(self, key: JobKey) -> None:
        """Whoever looks at the job is told that it is not its fault."""
        uid = self._uids.get(key)
        if uid is not None:
            event = Event("Warning", Reason.OPERATOR_FAULT, Reason.OPERATOR_FAULT.sentence)
            self._cluster.tell_of(key, uid, event)

    async def _stall(self, key: JobKey, error: Unreadable) -> tuple[str, float | None]:
        """A job that the API server took and this version cannot read: say so, touch nothing."""
        job = error.job
        about, spec = job["metadata"], job.get("spec") or {}
        manager = spec.get("managedBy") if isinstance(spec, dict) else None
        if manager not in (None, MANAGER):
            return "unchanged", None
        due = _end_of_finished(job)
        if due is not None:
            return await self._outlive(key, about["uid"], due)
        message = _faults(error)
        patch = _stalled(job, message, self._now())
        self._uids[key] = about["uid"]
        if patch is None:
            return "unreadable", None
        await self._cluster.patch_status(key, about["uid"], about["resourceVersion"], patch)
        event = Event("Warning", Reason.INVALID_SPEC, message)
        self._cluster.tell_of(key, about["uid"], event)
        return "unreadable", None

    async def _outlive(self, key: JobKey, uid: str, due: datetime) -> tuple[str, float | None]:
        """A job that has ended needs no reading any more; it goes when its time is over."""
        self._uids[key] = uid
        if due == _NEVER:
            return "unreadable", None
        left = (due - self._now()).total_seconds()
        if left > 0.0:
            return "unreadable", left
        await self._cluster.delete_job(key, uid)
        return "unreadable", None


def _end_of_finished(job: Document) -> datetime | None:
    """When a job that has ended is to go, or `_NEVER`; None for one that has not ended."""
    status, spec = job.get("status"), job.get("spec")
    status = status if isinstance(status, dict) else {}
    if status.get("phase") not in (Phase.COMPLETE, Phase.FAILED):
        return None
    ttl = spec.get("ttlSecondsAfterFinished") if isinstance(spec, dict) else None
    try:
        ended = parse_time(status.get("completionTime"))
        return ended + timedelta(seconds=ttl) if ended and isinstance(ttl, int) else _NEVER
    except (TypeError, ValueError, OverflowError):
        return _NEVER


def _faults(error: Unreadable) -> str:
    found = explain(error.cause, CPTJob)
    text = "; ".join(f"{show(each.path)}: {each.message}" for each in found)
    return text[:_MESSAGE_CHARACTERS] or "the job cannot be read"


def _stalled(job: Document, message: str, now: datetime) -> Document | None:
    """The part of a status that says that the job cannot be read; None when it says so already."""
    status = job.get("status")
    status = status if isinstance(status, dict) else {}
    generation = job["metadata"].get("generation") or 0
    was = status.get("conditions")
    kept = {
        each.get("type"): each
        for each in (was if isinstance(was, list) else [])
        if isinstance(each, dict) and each.get("type") != Condition.RECONCILING
    }
    for kind, holds in ((Condition.READY, "False"), (Condition.STALLED, "True")):
        old = kept.get(kind, {})
        same = old.get("status") == holds
        kept[kind] = {
            "type": str(kind),
            "status": holds,
            "observedGeneration": generation,
            "lastTransitionTime": old.get("lastTransitionTime")
            if same
            else f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "reason": str(Reason.INVALID_SPEC),
            "message": message,
        }
    patch = {"observedGeneration": generation, "conditions": list(kept.values())}
    if not status.get("phase"):
        patch["phase"] = str(Phase.PENDING)
    if all(status.get(name) == value for name, value in patch.items()):
        return None
    return patch
