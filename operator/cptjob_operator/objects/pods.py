"""A job's pods as manifests: made from its frozen profile, its name and its number of nodes. Pure.

Plain dictionaries, built anew each time: a large job has hundreds, and nothing here is worth a
cache. Two calls with the same arguments give equal pods.
"""

from collections.abc import Collection
from typing import Any

from cptjob_api.job import CPTJob
from cptjob_operator.identity import NODE, NUM_NODES, PodId, base, owner
from cptjob_operator.objects import placement
from cptjob_operator.profile import QUEUE_LABEL, VOLUMES, Profile, Resources

Manifest = dict[str, Any]

STORE_PORT = 29400
HTTP_PORT = 9400
#: Where the job's ConfigMap is mounted.
CONFIG = "/etc/cptjob"
CONTAINER = "trainer"

# Kueue: https://kueue.sigs.k8s.io/docs/tasks/run/plain_pods
_GROUP_LABEL = "kueue.x-k8s.io/pod-group-name"
_GROUP_SIZE = "kueue.x-k8s.io/pod-group-total-count"
# Without it Kueue would make a hash of the pod's shape, which differs in a pod that avoids a node.
_ROLE_HASH = "kueue.x-k8s.io/role-hash"

# The root is read-only, so everything that libraries cache goes to the scratch volume.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "PYTHONUNBUFFERED": "1",
    # Its default is made from the user's name, which a numeric user does not have.
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
}

#: The trainer tells which ranks run where.
_NODE_NAME = {"name": "CPTJOB_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}


def coordinator(
    job: CPTJob,
    profile: Profile,
    pod_id: PodId,
    excluded_hard: Collection[str] = (),
    *,
    beside: bool = False,
    node: str | None = None,
) -> Manifest:
    """The pod that prepares data, hosts the store and serves progress. No queue and no GPU.

    beside: it shares a node with its worker; node: which one, where the worker has it already.
    """
    arguments = ["--store-port", str(STORE_PORT), "--http-port", str(HTTP_PORT), "--stay"]
    container = _container(profile, "cptjob_trainer.run.coordinator", arguments)
    container["resources"] = _resources(profile.coordinator)
    container["ports"] = [
        {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
        {"name": "store", "containerPort": STORE_PORT, "protocol": "TCP"},
    ]
    # Workers are made once it is ready, so each second between two looks is one that a job waits.
    container["readinessProbe"] = _probe("/readyz", period=1, failures=6, timeout=5)
    # It answers while it prepares, if slowly: only a process that hangs is to be killed.
    container["livenessProbe"] = _probe("/healthz", period=20, failures=6, timeout=10, delay=30)
    affinity = placement.coordinator_affinity(profile, beside=beside, node=node, hard=excluded_hard)
    spec = _spec(job, profile, container, affinity)
    if beside and node is None:
        spec |= _selector(profile)
    return _pod(job, pod_id, spec, annotations={NODE: node} if node else None)


def worker(
    job: CPTJob,
    profile: Profile,
    pod_id: PodId,
    excluded_soft: Collection[str] = (),
    excluded_hard: Collection[str] = (),
    near: str | None = None,
) -> Manifest:
    """A pod that trains. Nodes that pods failed on are avoided where possible, or at any price.

    near: the node to go to where possible.
    """
    name, uid = job.metadata.name, pod_id.uid
    nodes = job.spec.trainer.num_nodes
    arguments = [
        *("--store", f"{base(name, uid)}.{job.metadata.namespace}.svc:{STORE_PORT}"),
        *("--run-id", f"{uid}.{pod_id.attempt}"),
        *("--nnodes", str(nodes)),
        *("--nproc-per-node", str(profile.num_proc_per_node)),
    ]
    container = _container(profile, "cptjob_trainer.run.launch", arguments)
    container["resources"] = _resources(profile.worker)
    affinity = placement.worker_affinity(
        profile, uid, near=near, soft=excluded_soft, hard=excluded_hard
    )
    spec = _spec(job, profile, container, affinity) | _selector(profile)
    if profile.runtime_class_name:
        spec["runtimeClassName"] = profile.runtime_class_name
    if profile.scheduler_name:
        spec["schedulerName"] = profile.scheduler_name
    if profile.pod_group:
        spec["schedulingGroup"] = {"podGroupName": profile.pod_group}
    labels, annotations = dict(profile.labels), profile.annotations | {NUM_NODES: str(nodes)}
    if profile.queue:
        labels |= {
            QUEUE_LABEL: profile.queue,
            _GROUP_LABEL: f"{base(name, uid)}-{pod_id.attempt}",
        }
        annotations |= {_GROUP_SIZE: str(nodes), _ROLE_HASH: "worker"}
    return _pod(job, pod_id, spec, labels, annotations)


def _pod(
    job: CPTJob,
    pod_id: PodId,
    spec: Manifest,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> Manifest:
    name = job.metadata.name
    metadata: Manifest = {
        "name": pod_id.name(name),
        "namespace": job.metadata.namespace,
        "labels": (labels or {}) | pod_id.labels(name),
        "ownerReferences": [owner(name, pod_id.uid)],
    }
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _spec(job: CPTJob, profile: Profile, container: Manifest, affinity: Manifest) -> Manifest:
    """What both kinds of pods have alike."""
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": profile.termination_seconds,
        "securityContext": pod_security(profile),
        "affinity": affinity,
        "tolerations": placement.tolerations(profile),
        "containers": [container],
        "volumes": _volumes(base(job.metadata.name, job.metadata.uid or ""), profile),
    }
    if profile.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    if profile.priority_class_name:
        spec["priorityClassName"] = profile.priority_class_name
    return spec


def _selector(profile: Profile) -> Manifest:
    labels = placement.node_selector(profile)
    return {"nodeSelector": labels} if labels else {}


def _container(profile: Profile, module: str, arguments: list[str]) -> Manifest:
    environment = _ENVIRONMENT | profile.env
    container: Manifest = {
        "name": CONTAINER,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "command": ["python", "-m", module, "--config", f"{CONFIG}/config.json", *arguments],
        "env": [_NODE_NAME, *({"name": name, "value": environment[name]} for name in environment)],
        "securityContext": container_security(profile),
        "volumeMounts": _mounts(profile),
    }
    if profile.secret_refs:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in profile.secret_refs]
    return container


def pod_security(profile: Profile) -> Manifest:
    """What the pods of the job may do, by the standard that its pool keeps to."""
    context: Manifest = {"seccompProfile": {"type": "RuntimeDefault"}}
    if profile.security == "restricted":
        context["runAsNonRoot"] = True
    if profile.run_as_user is not None:
        context["runAsUser"] = profile.run_as_user
    if profile.fs_group is not None:
        context["fsGroup"] = profile.fs_group
        # Not every file of a large volume anew at each start.
        context["fsGroupChangePolicy"] = "OnRootMismatch"
    return context


def container_security(profile: Profile) -> Manifest:
    """The same of their containers."""
    if profile.security == "baseline":
        return {"allowPrivilegeEscalation": False}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def _resources(asked: Resources) -> Manifest:
    found: Manifest = {}
    if asked.requests:
        found["requests"] = dict(asked.requests)
    if asked.limits:
        found["limits"] = dict(asked.limits)
    return found


def _probe(path: str, *, period: int, failures: int, timeout: int, delay: int = 0) -> Manifest:
    probe: Manifest = {
        "httpGet": {"path": path, "port": HTTP_PORT},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }
    return probe | ({"initialDelaySeconds": delay} if delay else {})


def _volumes(name: str, profile: Profile) -> list[Manifest]:
    # Claims are numbered: their names may be longer than a volume's.
    claims = [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": each.claim}}
        for index, each in enumerate(profile.mounts)
    ]
    return [
        {"name": "config", "configMap": {"name": name}},
        {"name": "tmp", "emptyDir": {"sizeLimit": profile.scratch_size}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": profile.shm_size}},
        *claims,
    ]


def _mounts(profile: Profile) -> list[Manifest]:
    claims = [
        {
            "name": f"claim-{index}",
            "mountPath": f"{VOLUMES}/{each.claim}",
            **({"readOnly": True} if each.read_only else {}),
        }
        for index, each in enumerate(profile.mounts)
    ]
    return [
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        *claims,
    ]
