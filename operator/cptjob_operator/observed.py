"""What the operator sees of one job: one frozen value, made anew for each pass.

Parsing is tolerant: what a field of the API server does not say is None, and nothing here raises on
an object that the API server can hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cptjob_operator.identity import JobId, PodId, Role
from cptjob_operator.profile import Profile
from cptjob_trainer.config import AcceptedConfig
from cptjob_trainer.termination import Termination

PodPhase = Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"]


def parse_time(text: str | None) -> datetime | None:
    """A time of the API, such as 2026-01-31T12:00:00Z."""
    return datetime.fromisoformat(text) if text else None


@dataclass(frozen=True, slots=True)
class Disruption:
    """The condition DisruptionTarget: somebody took the pod away, with their reason."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the main container ended. `termination` is what it said itself, if it did."""

    exit_code: int
    reason: str  # of the kubelet: OOMKilled, Error, Completed
    message: str
    finished: datetime | None
    termination: Termination | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a container does not run: reason of the kubelet and its message."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of ours, as far as decisions look at it. Small: there are thousands."""

    id: PodId
    namespace: str
    name: str
    uid: str
    version: int  # resourceVersion; larger is newer (comparable since KEP-5504)
    phase: PodPhase
    created: datetime | None
    ready: bool
    node: str | None  # the node it is bound to
    address: str | None  # its IP
    deleting: datetime | None  # deletionTimestamp: when it is to be gone
    gated: bool  # a queue holds it back (schedulingGates)
    unschedulable: str | None  # what the scheduler said
    waiting: Waiting | None
    ended: Ended | None
    disruption: Disruption | None
    reason: str  # status.reason: Evicted, NodeLost, ...
    message: str
    image_id: str | None
    owner_uid: str | None
    bound_to: str | None = None  # the only node that it may go to, as a coordinator for its worker
    num_nodes: int | None = None  # workers of the gang that it was made for, as a worker
    pull_secrets: tuple[str, ...] = ()  # that it names, or its service account does for it

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        """It holds, or will hold, a node's resources."""
        return not self.finished

    @property
    def role(self) -> Role:
        return self.id.role

    @property
    def job(self) -> JobId:
        return JobId(self.namespace, self.id.uid)


@dataclass(frozen=True, slots=True)
class Node:
    """A node, as far as placement looks at it."""

    name: str
    labels: Mapping[str, str]
    ready: bool
    cordoned: bool
    fenced: bool  # taint node.kubernetes.io/out-of-service: its pods are known to be dead
    gpus: Mapping[str, int]  # allocatable, by resource name


@dataclass(frozen=True, slots=True)
class Child:
    """An object of the job beside its pods that exists."""

    kind: str
    name: str
    uid: str
    owner_uid: str | None
    hash: str  # of the content that was asked for when it was written


@dataclass(frozen=True, slots=True)
class Claim:
    """A volume claim that exists."""

    name: str
    access_modes: tuple[str, ...]
    phase: str = "Bound"
    storage_class: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What the coordinator said at /progress, and when it was read."""

    progress: Mapping[str, Any]  # JSON; whatever it holds, nothing may trust it
    read: datetime


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a pass may look at beside the job, the settings and the time."""

    pods: tuple[Pod, ...] = ()
    #: Pods that were seen and went without an end that anybody saw.
    vanished: frozenset[PodId] = frozenset()
    children: tuple[Child, ...] = ()
    #: What was frozen at acceptance, read back from the ConfigMap; None before acceptance.
    profile: Profile | None = None
    config: AcceptedConfig | None = None
    #: GPUs in use on each node by pods of others; None when nobody looked, or nobody may.
    used_gpus: Mapping[str, int] | None = None
    nodes: Mapping[str, Node] = field(default_factory=dict)
    #: Volume claims of the job; one that is not in it is missing. None: not looked at.
    claims: Mapping[str, Claim] | None = None
    report: Report | None = None
    #: What the API server refused in the last pass, by what was asked for: "pods" -> its message.
    refused: Mapping[str, str] = field(default_factory=dict)
