"""A small world of values to plan in: what is wanted happens, and tests play kubelet and scheduler.

It shows what `plan` decides over many passes. What Kubernetes does with it is for tests/cluster.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cptjob_api.conditions import Condition, Phase
from cptjob_api.job import CPTJob
from cptjob_api.status import CPTJobStatus
from cptjob_operator.identity import NODE, NUM_NODES, PodId, Role
from cptjob_operator.objects import children
from cptjob_operator.observed import (
    Child,
    Claim,
    Disruption,
    Ended,
    Node,
    Observed,
    Pod,
    Report,
    Waiting,
)
from cptjob_operator.plan.rules import plan
from cptjob_operator.profile import Profile
from cptjob_operator.settings import Settings
from cptjob_operator.wanted import Wanted
from cptjob_trainer.config import AcceptedConfig
from cptjob_trainer.termination import Termination

UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
BEGIN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)

SPEC: dict[str, Any] = {
    "model": {"storageUri": "pvc://models/llama"},
    "datasets": [{"name": "domain", "storageUri": "pvc://data/domain"}],
    "output": {"storageUri": "pvc://results"},
    "trainer": {"numNodes": 2, "resourcesPerNode": {"limits": {"nvidia.com/gpu": "8"}}},
    "scheduling": {"pool": "a100"},
}
SETTINGS: dict[str, Any] = {"pools": {"a100": {}}, "jobs": {"image": "cptjob/trainer:1"}}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, dictionaries merged."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


@dataclass
class World:
    """One job and its objects."""

    spec: dict[str, Any]
    settings: Settings
    now: datetime = BEGIN
    generation: int = 1
    status: CPTJobStatus | None = None
    pods: dict[PodId, Pod] = field(default_factory=dict)
    vanished: set[PodId] = field(default_factory=set)
    children: dict[str, Child] = field(default_factory=dict)
    profile: Profile | None = None
    config: AcceptedConfig | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    report: Report | None = None
    refused: dict[str, str] = field(default_factory=dict)
    claims: dict[str, Claim] | None = None
    used_gpus: dict[str, int] | None = None
    events: list[tuple[str, str]] = field(default_factory=list)
    made: list[PodId] = field(default_factory=list)
    writes: int = 0
    gone: bool = False
    _version: int = 0

    @property
    def job(self) -> CPTJob:
        job = CPTJob.model_validate_json(
            _json(
                {
                    "metadata": {"name": "job", "namespace": "team", "uid": UID,
                                 "generation": self.generation},
                    "spec": self.spec,
                }
            )
        )  # fmt: skip
        return job.model_copy(update={"status": self.status})

    @property
    def observed(self) -> Observed:
        return Observed(
            pods=tuple(self.pods.values()),
            vanished=frozenset(self.vanished),
            children=tuple(self.children.values()),
            profile=self.profile,
            config=self.config,
            nodes=dict(self.nodes),
            report=self.report,
            refused=dict(self.refused),
            used_gpus=self.used_gpus,
            claims=self._read_claims(),
        )

    def _read_claims(self) -> dict[str, Claim] | None:
        """None where it is not known yet which they are; `claims`, or all fit for several nodes."""
        if self.profile is None or self.claims is not None:
            return None if self.profile is None else self.claims
        names = [each.claim for each in self.profile.mounts]
        return {name: Claim(name, ("ReadWriteMany",)) for name in names}

    def plan(self) -> Wanted:
        return plan(self.job, self.observed, self.settings, self.now)

    def step(self) -> Wanted:
        """One pass: status first, then deletions, then objects."""
        wanted = self.plan()
        self.commit(wanted)
        self.apply(wanted)
        return wanted

    def commit(self, wanted: Wanted) -> None:
        """Writes the status; an operator may die after this."""
        if wanted.status is not None:
            self.writes += 1
            # Through JSON, as the API server keeps it.
            self.status = CPTJobStatus.from_json(wanted.status.model_dump_json())

    def apply(self, wanted: Wanted) -> None:
        for deletion in wanted.deletions:
            if deletion.kind == "CPTJob":
                self.gone = True
                continue
            found = next((pod for pod in self.pods.values() if pod.uid == deletion.uid), None)
            if found is not None and (found.finished or deletion.grace_seconds == 0):
                del self.pods[found.id]
            elif found is not None:
                self.pods[found.id] = replace(found, deleting=self.now)
        for manifest in (*wanted.objects, *wanted.extras):
            self._make(manifest)
        self.events += [(each.reason, each.message) for each in wanted.events]

    def _make(self, manifest: dict[str, Any]) -> None:
        if manifest["kind"] != "Pod":
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            key = kind if name.endswith(UID[:5]) else f"{kind} {name}"
            self.children[key] = Child(kind, name, f"{name}-uid", UID, children.hash_of(manifest))
            if kind == "ConfigMap":
                self.profile = Profile.from_json(manifest["data"]["profile.json"])
                self.config = AcceptedConfig.from_json(manifest["data"]["config.json"])
            return
        if self.refused:
            return
        identity = PodId.of(manifest["metadata"]["labels"])
        assert identity is not None
        assert identity not in self.pods, f"{identity} is made twice"
        self._version += 1
        self.made.append(identity)
        annotations = manifest["metadata"].get("annotations", {})
        self.pods[identity] = Pod(
            id=identity,
            namespace="team",
            name=manifest["metadata"]["name"],
            uid=f"uid-{self._version}",
            version=self._version,
            phase="Pending",
            created=self.now,
            ready=False,
            node=None,
            address=None,
            deleting=None,
            gated=False,
            unschedulable=None,
            waiting=None,
            ended=None,
            disruption=None,
            reason="",
            message="",
            image_id=None,
            owner_uid=UID,
            bound_to=annotations.get(NODE),
            num_nodes=int(annotations[NUM_NODES]) if NUM_NODES in annotations else None,
        )

    # --- kubelet and scheduler ----------------------------------------------------------------

    def settle(self, passes: int = 12) -> None:
        """Passes until nothing is wanted any more; deleted pods go, so a stop does end."""
        for _ in range(passes):
            before = (self.status, dict(self.pods), dict(self.children))
            self.step()
            for identity in [pod.id for pod in self.pods.values() if pod.deleting]:
                del self.pods[identity]
            if before == (self.status, self.pods, self.children):
                return
        raise AssertionError("it never comes to rest")

    def pod(self, role: Role, index: int = 0) -> Pod:
        """The newest pod of that role and index."""
        found = [pod for pod in self.pods.values() if (pod.role, pod.id.index) == (role, index)]
        return max(found, key=lambda pod: pod.version)

    def change(self, pod: Pod, **changes: Any) -> None:
        self._version += 1
        self.pods[pod.id] = replace(self.pods[pod.id], version=self._version, **changes)

    def get_ready(self, *pods: Pod) -> None:
        for pod in pods:
            self.change(pod, phase="Running", ready=True, node=pod.node or f"node-{pod.id.index}")

    def fail(
        self, pod: Pod, code: int = 1, reason: str = "", message: str = "", **more: Any
    ) -> None:
        said = Termination(code, reason, message) if reason else None
        end = Ended(code, "Error", "", self.now, said)
        self.change(pod, phase="Failed", ready=False, ended=end, **more)

    def succeed(self, pod: Pod, reason: str = "") -> None:
        said = Termination(0, reason, "") if reason else None
        end = Ended(0, "Completed", "", self.now, said)
        self.change(pod, phase="Succeeded", ready=False, ended=end)

    def vanish(self, pod: Pod) -> None:
        del self.pods[pod.id]
        self.vanished.add(pod.id)

    def take_away(self, pod: Pod, reason: str = "EvictionByEvictionAPI") -> None:
        self.change(pod, disruption=Disruption(reason, "drained"), deleting=self.now)

    def hold_up(self, pod: Pod, reason: str, message: str = "") -> None:
        self.change(pod, waiting=Waiting(reason, message), node=f"node-{pod.id.index}")

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def edit(self, **changes: Any) -> None:
        self.spec = merged(self.spec, changes)
        self.generation += 1

    def train(self) -> None:
        """Brings the job to where every worker trains."""
        self.settle()
        self.get_ready(self.pod(Role.COORDINATOR))
        self.settle()
        self.get_ready(*self.workers)
        self.settle()
        assert self.phase is Phase.RUNNING

    def checkpoint(self, step: int) -> None:
        """The trainer reports a step, and a checkpoint at it."""
        time = self.now.isoformat()
        saved = {"step": step, "time": time, "uri": f"pvc://results/job/checkpoints/step-{step}"}
        progress = {"currentStep": step, "totalSteps": 100, "lastCheckpoint": saved}
        self.report = Report(progress, self.now)

    # --- what to look at ----------------------------------------------------------------------

    @property
    def phase(self) -> Phase | None:
        return self.status.phase if self.status else None

    @property
    def workers(self) -> list[Pod]:
        found = [pod for pod in self.pods.values() if pod.role is Role.WORKER and pod.active]
        return sorted(found, key=lambda pod: pod.id)

    def condition(self, kind: Condition) -> tuple[str, str] | None:
        found = self.status.condition(kind) if self.status else None
        return (found.status, found.reason) if found else None


def _json(document: dict[str, Any]) -> str:
    import json

    return json.dumps(document)


MakeWorld = Callable[..., World]


@pytest.fixture
def world() -> MakeWorld:
    """A world with a job of two workers in pool a100; keyword arguments change its spec."""

    def make(settings: dict[str, Any] | None = None, **changes: Any) -> World:
        rules = Settings.from_json(_json(merged(SETTINGS, settings or {})))
        return World(spec=merged(SPEC, changes), settings=rules)

    return make
