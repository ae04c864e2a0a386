"""What a rule looks at, and the ways to say what follows. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from cptjob_api.conditions import Condition, Phase, Reason
from cptjob_api.job import CPTJob, tensorboard_name
from cptjob_api.spec import CPTJobSpec
from cptjob_api.status import CPTJobStatus, NodeRanks, PodCounts
from cptjob_operator.identity import Role, base, worker_selector
from cptjob_operator.objects import children, placement, tensorboard
from cptjob_operator.observed import Observed, Pod
from cptjob_operator.plan import accounting, standing
from cptjob_operator.plan.gang import Gang
from cptjob_operator.plan.reported import read_report
from cptjob_operator.profile import Profile
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Deletion, Event, Wanted

#: Finished pods that are kept for their logs.
KEPT_FAILED_PODS = 4
#: How often to look again at what no event tells.
LOOK_AGAIN_SECONDS = 15.0


@dataclass(frozen=True)
class Look:
    """Everything a rule may look at, and the ways to say what follows."""

    job: CPTJob
    observed: Observed
    settings: Settings
    now: datetime
    #: What rules before this one have decided: told and counted with whatever follows.
    events: tuple[Event, ...] = ()
    restarts: tuple[str, ...] = ()

    # --- what is there ------------------------------------------------------------------------

    @cached_property
    def status(self) -> CPTJobStatus:
        """The status with its accounts and the trainer's report brought up to now."""
        status = self.job.status or CPTJobStatus()
        status = accounting.account(status, self.gpus_per_node, self.now)
        return read_report(status, self.observed.report)

    @property
    def spec(self) -> CPTJobSpec:
        return self.job.spec

    @property
    def uid(self) -> str:
        return self.job.metadata.uid or ""

    @property
    def generation(self) -> int:
        return self.job.metadata.generation or 0

    @property
    def profile(self) -> Profile:
        assert self.observed.profile is not None, "asked for before acceptance"
        return self.observed.profile

    @property
    def gpus_per_node(self) -> int:
        return self.observed.profile.gpus_per_node if self.observed.profile else 0

    @cached_property
    def gang(self) -> Gang:
        return Gang(
            self.uid,
            self.spec.trainer.num_nodes,
            self.status,
            self.observed.pods,
            self.observed.vanished,
        )

    @cached_property
    def avoided(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Nodes to avoid where possible, and at any price: never so many that too few are left."""
        known = self.status.excluded_nodes
        excluded = [each for each in known if each.until is None or each.until > self.now]
        twice = [each.name for each in excluded if each.failures >= 2]
        hard = placement.affordable(self.profile, self.gang.size, self.observed.nodes, twice)
        return tuple(each.name for each in excluded if each.name not in hard), hard

    # --- what follows -------------------------------------------------------------------------

    def with_status(self, status: CPTJobStatus, **changes: Any) -> "Look":
        """The same look after `status` was decided on."""
        look = replace(self, **changes)
        look.__dict__["status"] = status
        return look

    def stand(
        self,
        phase: Phase,
        reason: Reason,
        message: str = "",
        *extra: tuple[Condition, bool, Reason, str],
        **changes: Any,
    ) -> CPTJobStatus:
        """The status of a job in `phase`, with its counts, its conditions and `changes`."""
        gang, before = self.gang, self.status
        nodes = {pod.node for pod in gang.active_workers if pod.node}
        counts = PodCounts(
            active=len(gang.active_workers),
            scheduled=sum(pod.node is not None for pod in gang.active_workers),
            ready=sum(pod.ready for pod in gang.workers if pod.active),
            succeeded=sum(pod.phase == "Succeeded" for pod in gang.workers),
            failed=sum(pod.phase == "Failed" and pod.role is Role.WORKER for pod in gang.pods),
        )
        ranks = {each.name: each.ranks for each in before.nodes}
        return before.model_copy(
            update={
                "observed_generation": self.generation,
                "phase": phase,
                "start_time": before.start_time or self.now,
                "pods": counts,
                "replicas": counts.active,
                "selector": worker_selector(self.job.metadata.name, self.uid),
                "nodes": tuple(
                    NodeRanks(name=name, ranks=ranks.get(name, ())) for name in sorted(nodes)
                ),
                "accounted_time": before.accounted_time or self.now,
                **changes,
                "conditions": standing.conditions(
                    before.conditions,
                    phase,
                    reason,
                    message,
                    self.generation,
                    self.now,
                    (*self._checkpoint(phase), *extra),
                ),
            }
        )

    def _checkpoint(self, phase: Phase) -> Iterable[tuple[Condition, bool, Reason, str]]:
        saved = self.status.last_checkpoint
        kind = Condition.CHECKPOINT_READY
        if saved is not None:
            yield kind, True, Reason.CHECKPOINT_SAVED, f"step {saved.step}"
        elif self.ran or phase is Phase.RUNNING:
            yield kind, False, Reason.NO_CHECKPOINT, Reason.NO_CHECKPOINT.sentence

    @property
    def ran(self) -> bool:
        """A gang has run before: from then on the condition CheckpointReady is there."""
        return self.status.condition(Condition.CHECKPOINT_READY) is not None

    def wait(
        self, phase: Phase, reason: Reason, message: str, seconds: float | None = None
    ) -> Wanted:
        """Nothing to do but to say why, and to keep the job's objects as they should be."""
        again = None if seconds is None else self.now + timedelta(seconds=seconds)
        status = self.stand(phase, reason, message)
        return self.settle(Wanted(status=status, objects=self.missing_children(), again=again))

    def fail(self, reason: Reason, message: str) -> Wanted:
        """The end without a model."""
        status = self.stand(
            Phase.FAILED, reason, message, completion_time=self.now, retry_time=None
        )
        return Wanted(
            status=status,
            deletions=delete(self.gang.active, "the job has failed"),
            events=(Event("Warning", reason, message),),
            again=self.now,
        )

    def settle(self, wanted: Wanted) -> Wanted:
        """What every pass of a living job does beside.

        It removes what is not wanted any more, and comes again when the job's time is over.
        """
        surplus = delete(self.gang.surplus, "replaced") + self.stuck()
        due = [each for each in (wanted.again, self._deadline(wanted.status)) if each is not None]
        settled = replace(
            wanted,
            deletions=(*wanted.deletions, *surplus, *self.old()),
            again=min(due, default=None),
        )
        return self.with_extras(settled)

    def with_extras(self, wanted: Wanted) -> Wanted:
        """The same, with what people look at as long as the job is there.

        It comes again, as what is refused now may be let in later.
        """
        extras = self.missing_tensorboard()
        if not extras:
            return wanted
        soon = self.now + timedelta(seconds=LOOK_AGAIN_SECONDS)
        return replace(wanted, extras=extras, again=min(wanted.again or soon, soon))

    def _deadline(self, status: CPTJobStatus | None) -> datetime | None:
        """When the job will have held pods for as long as it may."""
        limit = self.spec.active_deadline_seconds
        if limit is None or status is None or not accounting.holds(status):
            return None
        return self.now + timedelta(seconds=max(1, limit - status.active_seconds))

    def stuck(self) -> tuple[Deletion, ...]:
        """Pods that are to go and whose node is gone, so that nobody can say that they went."""
        return tuple(
            Deletion("Pod", pod.name, pod.uid, grace_seconds=0, why="its node is gone")
            for pod in self.gang.pods
            if pod.deleting is not None and pod.node and self._is_gone(pod.node)
        )

    def _is_gone(self, name: str) -> bool:
        node = self.observed.nodes.get(name)
        return bool(self.observed.nodes) and (node is None or node.fenced)

    def old(self) -> tuple[Deletion, ...]:
        """Finished pods beyond those that are kept for their logs."""
        gang = self.gang
        wanted = {gang.coordinator_id, *(pod.id for pod in gang.workers)}
        replaced = [
            pod
            for pod in gang.pods
            if pod.finished and pod.deleting is None and pod.id not in wanted
        ]
        replaced.sort(key=lambda pod: pod.version, reverse=True)
        return delete(replaced[KEPT_FAILED_PODS:], "its log made room for newer ones")

    def missing_children(self) -> tuple[dict[str, Any], ...]:
        """ConfigMap, Service and NetworkPolicy, as far as they are missing or differ."""
        there = self._hashes(base(self.job.metadata.name, self.uid))
        return children.missing(
            self.job, self.profile, self.observed.config, self.settings.network, there
        )

    def missing_tensorboard(self) -> tuple[dict[str, Any], ...]:
        """What shows the job's curves, from when there is something to train on until it is deleted.

        Not before: a job that cannot start holds nothing.
        """
        profile = self.observed.profile
        if profile is None or profile.log_dir is None or not self._is_prepared:
            return ()
        there = self._hashes(tensorboard_name(self.job.metadata.name))
        return tensorboard.missing(self.job, profile, there)

    def _hashes(self, name: str) -> dict[str, str]:
        """Of the objects of that name, by their kind."""
        return {each.kind: each.hash for each in self.observed.children if each.name == name}

    @property
    def _is_prepared(self) -> bool:
        known = self.status.condition(Condition.PREPARED)
        if known is not None and known.status == "True":
            return True
        pod = self.gang.coordinator
        return self.status.phase is Phase.COMPLETE or (pod is not None and pod.ready)


def delete(pods_: Iterable[Pod], why: str) -> tuple[Deletion, ...]:
    return tuple(
        Deletion("Pod", pod.name, pod.uid, why=why) for pod in pods_ if pod.deleting is None
    )
