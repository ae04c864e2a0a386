"""Objects of the API server, as it sends them, made into the small values that decisions look at.

Tolerant: a field that is missing, or is not what it should be, reads as if nothing had been said.
"""

import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, cast, get_args

from pydantic_core import to_json

from cptjob_api.job import API_VERSION, KIND, tensorboard_name
from cptjob_operator.identity import JOB_NAME, JOB_UID, NODE, NUM_NODES, JobId, PodId, base
from cptjob_operator.objects.children import HASH
from cptjob_operator.observed import (
    Child,
    Claim,
    Disruption,
    Ended,
    Node,
    Pod,
    PodPhase,
    Waiting,
    parse_time,
)
from cptjob_trainer.termination import Termination

_API_VERSION, _KIND = API_VERSION.encode(), KIND.encode()
_PHASES = frozenset(get_args(PodPhase))
_FENCED = "node.kubernetes.io/out-of-service"
_MESSAGE_CHARACTERS = 4096


def pod(body: Mapping[str, Any]) -> Pod | None:
    """A pod of ours; None when its labels do not say who it is, or its name or owner disagrees."""
    about, spec, status = _map(body, "metadata"), _map(body, "spec"), _map(body, "status")
    labels = {k: v for k, v in _map(about, "labels").items() if isinstance(v, str)}
    identity = PodId.of(labels)
    if identity is None or identity.uid != owner_uid(body):
        return None
    if _text(about, "name") != identity.name(labels.get(JOB_NAME, "")):
        return None  # a copy that somebody made
    phase = _text(status, "phase")
    conditions = {_text(each, "type"): each for each in _maps(status, "conditions")}
    main = next(_maps(spec, "containers"), {})
    states = {_text(each, "name"): each for each in _maps(status, "containerStatuses")}
    own = states.get(_text(main, "name"), {})
    return Pod(
        id=identity,
        namespace=_name(about, "namespace"),
        name=_text(about, "name"),
        uid=_text(about, "uid"),
        version=version(body),
        phase=cast(PodPhase, phase) if phase in _PHASES else "Unknown",
        created=_time(about, "creationTimestamp"),
        ready=_text(conditions.get("Ready", {}), "status") == "True",
        node=_name(spec, "nodeName") or None,
        address=_text(status, "podIP") or None,
        deleting=_time(about, "deletionTimestamp"),
        gated=bool(spec.get("schedulingGates")),
        unschedulable=_unschedulable(conditions.get("PodScheduled", {})),
        waiting=_waiting(status),
        ended=_ended(own),
        disruption=_disruption(conditions.get("DisruptionTarget", {})),
        reason=_name(status, "reason"),
        message=_text(status, "message")[:_MESSAGE_CHARACTERS],
        image_id=_name(own, "imageID") or None,
        owner_uid=owner_uid(body),
        bound_to=_text(_map(about, "annotations"), NODE) or None,
        num_nodes=_count(_map(about, "annotations"), NUM_NODES),
        pull_secrets=tuple(
            filter(None, (_name(each, "name") for each in _maps(spec, "imagePullSecrets")))
        ),
    )


def node(body: Mapping[str, Any]) -> Node:
    about, spec, status = _map(body, "metadata"), _map(body, "spec"), _map(body, "status")
    conditions = {
        _text(each, "type"): _text(each, "status") for each in _maps(status, "conditions")
    }
    labels = _map(about, "labels")
    return Node(
        name=_name(about, "name"),
        labels={_intern(k): _intern(v) for k, v in labels.items() if isinstance(v, str)},
        ready=conditions.get("Ready") == "True",
        cordoned=spec.get("unschedulable") is True,
        fenced=any(_text(taint, "key") == _FENCED for taint in _maps(spec, "taints")),
        gpus=dict(_extended(_map(status, "allocatable"))),
    )


def child(kind: str, body: Mapping[str, Any]) -> Child:
    about = _map(body, "metadata")
    return Child(
        kind=kind,
        name=_text(about, "name"),
        uid=_text(about, "uid"),
        owner_uid=owner_uid(body),
        hash=_text(_map(about, "annotations"), HASH),
    )


def claim(body: Mapping[str, Any]) -> Claim:
    spec = _map(body, "spec")
    modes = spec.get("accessModes")
    known = (
        tuple(each for each in modes if isinstance(each, str)) if isinstance(modes, list) else ()
    )
    return Claim(
        name=_text(_map(body, "metadata"), "name"),
        access_modes=known,
        phase=_text(_map(body, "status"), "phase"),
        storage_class=_text(spec, "storageClassName"),
    )


def version(body: Mapping[str, Any]) -> int:
    """resourceVersion as the number that it is; 0 when there is none."""
    try:
        return int(_map(body, "metadata").get("resourceVersion") or 0)
    except (TypeError, ValueError):
        return 0


def owner_uid(body: Mapping[str, Any]) -> str | None:
    """Uid of the object that controls this one."""
    for each in _maps(_map(body, "metadata"), "ownerReferences"):
        if each.get("controller") is True:
            return _name(each, "uid") or None
    return None


def job_id(body: Mapping[str, Any]) -> JobId | None:
    """The job that an object of ours is for, as its label says."""
    about = _map(body, "metadata")
    uid = _text(_map(about, "labels"), JOB_UID)
    return JobId(_name(about, "namespace"), uid) if uid else None


def child_names(kind: str, body: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that an object of ours, which is not a pod, may have by its labels."""
    labels = _map(_map(body, "metadata"), "labels")
    job = _text(labels, JOB_NAME)
    common = base(job, _text(labels, JOB_UID))
    return (common,) if kind == "ConfigMap" else (common, tensorboard_name(job))


class Holder(NamedTuple):
    """A pod, not necessarily ours, that holds GPUs of its node. job: its uid, of one of ours."""

    job: str | None
    priority: str
    gpus: int

    def stays(self, uid: str | None, priority: str | None) -> bool:
        """Whether a job must do without these GPUs.

        Its own pods make room for their successors. What becomes of another job's when it names a
        class of priority that they do not have is for the scheduler to judge.
        """
        if self.job is None:
            return True
        return self.job != uid and priority in (None, self.priority)


def holder(body: Mapping[str, Any]) -> Holder | None:
    """None for a pod that holds no GPU, or has ended."""
    spec = _map(body, "spec")
    gpus = sum(_gpus(each) for each in _maps(spec, "containers"))
    if not gpus or _text(_map(body, "status"), "phase") in ("Succeeded", "Failed"):
        return None
    ours = pod(body)
    return Holder(ours.id.uid if ours else None, _text(spec, "priorityClassName"), gpus)


# --- parts of a pod ---


def _unschedulable(condition: Mapping[str, Any]) -> str | None:
    if _text(condition, "status") == "False" and _text(condition, "reason") == "Unschedulable":
        return _text(condition, "message")[:_MESSAGE_CHARACTERS]
    return None


def _waiting(status: Mapping[str, Any]) -> Waiting | None:
    """Why the first container that waits does so, with a reason to tell."""
    for group in ("initContainerStatuses", "containerStatuses"):
        for each in _maps(status, group):
            waits = _map(_map(each, "state"), "waiting")
            if waits.get("reason"):
                message = _text(waits, "message")[:_MESSAGE_CHARACTERS]
                return Waiting(_name(waits, "reason"), message)
    return None


def _ended(container: Mapping[str, Any]) -> Ended | None:
    """How the container ended for the last time; it is never started again."""
    state = _map(_map(container, "state"), "terminated")
    code = state.get("exitCode")
    if not isinstance(code, int):
        return None
    message = _text(state, "message")[:_MESSAGE_CHARACTERS]
    try:
        termination = Termination.from_json(message)
    except (ValueError, OverflowError, RecursionError):
        termination = None
    return Ended(code, _name(state, "reason"), message, _time(state, "finishedAt"), termination)


def _disruption(condition: Mapping[str, Any]) -> Disruption | None:
    if _text(condition, "status") != "True":
        return None
    return Disruption(_name(condition, "reason"), _text(condition, "message")[:_MESSAGE_CHARACTERS])


def _gpus(container: Mapping[str, Any]) -> int:
    """GPUs of a container: of its extended resources those that are named so."""
    limits = _map(_map(container, "resources"), "limits")
    return sum(count for name, count in _extended(limits) if "gpu" in name)


def _extended(resources: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Resources that a device plugin offers, by name; whole numbers by Kubernetes' rule."""
    for name, amount in resources.items():
        if "/" in name and not name.startswith(("hugepages-", "kubernetes.io/")):
            try:
                yield _intern(name), int(amount)
            except (TypeError, ValueError):
                continue


# --- fields that may be anything ---


def _map(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = of.get(key)
    return value if isinstance(value, dict) else {}


def _maps(of: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    value = of.get(key)
    if isinstance(value, list):
        yield from (each for each in value if isinstance(each, dict))


def _text(of: Mapping[str, Any], key: str) -> str:
    value = of.get(key)
    return value if isinstance(value, str) else ""


def _count(of: Mapping[str, Any], key: str) -> int | None:
    """A small number that stands in a text."""
    text = _text(of, key)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _name(of: Mapping[str, Any], key: str) -> str:
    """A text that many objects share, kept once."""
    return _intern(_text(of, key))


def _intern(text: str) -> str:
    return sys.intern(text) if type(text) is str else text


def _time(of: Mapping[str, Any], key: str) -> datetime | None:
    try:
        return parse_time(_text(of, key))
    except ValueError:
        return None


class JobParts(NamedTuple):
    """A job as JSON, in three parts, as only two of them change while it runs."""

    metadata: bytes
    spec: bytes
    status: bytes

    @property
    def whole(self) -> bytes:
        head = b'{"apiVersion":"%s","kind":"%s","metadata":' % (_API_VERSION, _KIND)
        return head + self.metadata + b',"spec":' + self.spec + b',"status":' + self.status + b"}"


def job(body: Mapping[str, Any]) -> JobParts:
    """A job without what nobody here reads."""
    about = {k: v for k, v in _map(body, "metadata").items() if k != "managedFields"}
    annotations = about.get("annotations")
    if isinstance(annotations, dict):
        # kubectl's copy of the whole manifest.
        kept = {
            k: v for k, v in annotations.items() if not k.endswith("last-applied-configuration")
        }
        about["annotations"] = kept
    return JobParts(to_json(about), to_json(body.get("spec")), to_json(body.get("status")))
