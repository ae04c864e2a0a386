"""The job's pods, sorted into what each one is to the gang that is wanted now. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cptjob_api.status import CPTJobStatus, Incarnation
from cptjob_operator.identity import PodId, Role
from cptjob_operator.observed import Pod


@dataclass(frozen=True)
class Gang:
    """The pods of one job against what its status says they should be.

    uid: of the job. size: workers wanted. pods: all of the job's pods that exist.
    vanished: identities whose pods were seen and went without an end.
    """

    uid: str
    size: int
    status: CPTJobStatus
    pods: tuple[Pod, ...]
    vanished: frozenset[PodId]

    @cached_property
    def _incarnations(self) -> dict[tuple[str, int], int]:
        return {(each.role, each.index): each.incarnation for each in self.status.incarnations}

    @cached_property
    def _by_id(self) -> dict[PodId, Pod]:
        return {pod.id: pod for pod in self.pods}

    def incarnation(self, role: Role, index: int) -> int:
        """The newest incarnation that was decided on."""
        return self._incarnations.get((str(role), index), 0)

    def worker_id(self, index: int) -> PodId:
        """Identity of the worker that is wanted at `index`."""
        incarnation = self.incarnation(Role.WORKER, index)
        return PodId(self.uid, self.status.attempt, Role.WORKER, index, incarnation)

    @property
    def coordinator_id(self) -> PodId:
        """Identity of the coordinator that is wanted. It outlives attempts, so it has attempt 0."""
        return PodId(self.uid, 0, Role.COORDINATOR, 0, self.incarnation(Role.COORDINATOR, 0))

    @property
    def coordinator(self) -> Pod | None:
        return self._by_id.get(self.coordinator_id)

    @cached_property
    def _worker_ids(self) -> tuple[PodId, ...]:
        return tuple(self.worker_id(index) for index in range(self.size))

    @cached_property
    def workers(self) -> tuple[Pod, ...]:
        """The wanted workers that exist, by index."""
        found = (self._by_id.get(each) for each in self._worker_ids)
        return tuple(pod for pod in found if pod is not None)

    @cached_property
    def missing(self) -> tuple[PodId, ...]:
        """Wanted workers that do not exist."""
        return tuple(each for each in self._worker_ids if each not in self._by_id)

    @cached_property
    def surplus(self) -> tuple[Pod, ...]:
        """Pods that run and are not wanted: of an earlier attempt or incarnation, or one too many."""
        wanted = {*self._worker_ids, self.coordinator_id}
        return tuple(pod for pod in self.pods if pod.active and pod.id not in wanted)

    @cached_property
    def active(self) -> tuple[Pod, ...]:
        """Every pod of the job that holds or will hold a node, wanted or not."""
        return tuple(pod for pod in self.pods if pod.active)

    @cached_property
    def active_workers(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.active if pod.role is Role.WORKER)

    def ended(self, pods: Iterable[Pod]) -> tuple[Pod, ...]:
        """Those of `pods` that failed, or are being taken away."""
        return tuple(pod for pod in pods if pod.phase == "Failed" or pod.deleting is not None)

    def next_incarnation(self, *ids: PodId) -> CPTJobStatus:
        """The status with the next incarnation of each of these pods decided on."""
        table = dict(self._incarnations)
        for each in ids:
            table[str(each.role), each.index] = each.incarnation + 1
        return with_incarnations(self.status, table)


def with_incarnations(status: CPTJobStatus, table: dict[tuple[str, int], int]) -> CPTJobStatus:
    """The status with this table of incarnations; zeros are left out, as that is what none means."""
    rows = tuple(
        Incarnation(role=role, index=index, incarnation=number)
        for (role, index), number in sorted(table.items())
        if number > 0
    )
    return status.model_copy(update={"incarnations": rows})


def next_attempt(status: CPTJobStatus) -> CPTJobStatus:
    """The status with all workers to be made anew. The coordinator keeps its incarnation."""
    table = {
        (each.role, each.index): each.incarnation
        for each in status.incarnations
        if each.role == Role.COORDINATOR
    }
    return with_incarnations(status.model_copy(update={"attempt": status.attempt + 1}), table)
