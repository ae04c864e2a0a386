"""TensorBoard beside a job: a pod that shows its event files, a name for it, a fence. Pure.

It is a Deployment, as it outlives the job's pods and no pass has to look after it. Its pod carries
none of the labels by which the operator, the job's Service and its NetworkPolicy know the job's
pods: it is not one of them.
"""

from collections.abc import Mapping
from typing import Any

from cptjob_api.job import GROUP, TENSORBOARD_PORT, CPTJob, tensorboard_name
from cptjob_operator.objects import placement
from cptjob_operator.objects.children import child, hash_of
from cptjob_operator.objects.pods import container_security, pod_security
from cptjob_operator.profile import VOLUMES, Profile

Manifest = dict[str, Any]

#: Label of the pod; its value is the uid of the job.
OF_JOB = f"{GROUP}/tensorboard"
#: Label of pods that may read every TensorBoard of their namespace.
READER = f"{GROUP}/tensorboard-reader"

_NAME = "tensorboard"
# It reads one small folder and imports no torch.
_RESOURCES = {
    "requests": {"cpu": "50m", "memory": "256Mi"},
    "limits": {"memory": "1Gi"},
}
_SCRATCH = "256Mi"
# It may have found room on a GPU node only, which the autoscaler would keep for its emptyDir.
_MAY_MOVE = "cluster-autoscaler.kubernetes.io/safe-to-evict"


def missing(job: CPTJob, profile: Profile, there: Mapping[str, str]) -> tuple[Manifest, ...]:
    """What is not there, or differs from what it should be; nothing for a job that has not asked.

    there: hash of each of these objects that exists, by its kind.
    """
    if profile.log_dir is None:
        return ()
    every = (service(job), network_policy(job), deployment(job, profile, profile.log_dir))
    return tuple(each for each in every if there.get(each["kind"]) != hash_of(each))


def deployment(job: CPTJob, profile: Profile, log_dir: str) -> Manifest:
    """One pod at a time, of the job's own image, that can do nothing but read."""
    labels = _labels(job)
    spec = {
        "replicas": 1,
        "revisionHistoryLimit": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels, "annotations": {_MAY_MOVE: "true"}},
            "spec": _pod(profile, log_dir),
        },
    }
    return _child(job, "apps/v1", "Deployment", spec)


def service(job: CPTJob) -> Manifest:
    """The name that people open, by a port that is forwarded."""
    port = {
        "name": "http",
        "port": TENSORBOARD_PORT,
        "targetPort": TENSORBOARD_PORT,
        "protocol": "TCP",
    }
    return _child(job, "v1", "Service", {"selector": _labels(job), "ports": [port]})


def network_policy(job: CPTJob) -> Manifest:
    """TensorBoard asks for no password: only pods that somebody has marked reach it, and it nobody.

    A forwarded port comes from the node itself, which no policy holds up.
    """
    spec = {
        "podSelector": {"matchLabels": _labels(job)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {READER: "true"}}}],
                "ports": [{"protocol": "TCP", "port": TENSORBOARD_PORT}],
            }
        ],
    }
    return _child(job, "networking.k8s.io/v1", "NetworkPolicy", spec)


def _labels(job: CPTJob) -> dict[str, str]:
    return {OF_JOB: job.metadata.uid or ""}


def _child(job: CPTJob, version: str, kind: str, spec: Manifest) -> Manifest:
    return child(job, version, kind, {"spec": spec}, name=tensorboard_name(job.metadata.name))


def _pod(profile: Profile, log_dir: str) -> Manifest:
    spec: Manifest = {
        "serviceAccountName": profile.service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "securityContext": pod_security(profile),
        "affinity": placement.coordinator_affinity(profile),
        "tolerations": placement.tolerations(profile),
        "containers": [_container(profile, log_dir)],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": _SCRATCH}},
            {"name": "output", "persistentVolumeClaim": {"claimName": profile.output_claim}},
        ],
    }
    if profile.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    return spec


def _container(profile: Profile, log_dir: str) -> Manifest:
    return {
        "name": _NAME,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "command": [
            *("python", "-m", "tensorboard.main", "--logdir", log_dir),
            *("--bind_all", "--port", str(TENSORBOARD_PORT)),
        ],
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "TMPDIR", "value": "/tmp"}],
        "ports": [{"name": "http", "containerPort": TENSORBOARD_PORT, "protocol": "TCP"}],
        "resources": {name: dict(amounts) for name, amounts in _RESOURCES.items()},
        "securityContext": container_security(profile),
        "readinessProbe": {
            "httpGet": {"path": "/data/logdir", "port": TENSORBOARD_PORT},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {
                "name": "output",
                "mountPath": f"{VOLUMES}/{profile.output_claim}",
                "readOnly": True,
            },
        ],
    }
