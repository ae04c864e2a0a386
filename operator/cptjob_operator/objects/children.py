"""What a job needs beside pods: its frozen configuration, a name for the store, a fence. Pure.

Each carries a hash of what was asked for, so that a pass can tell whether one differs without
reading it back field by field.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cptjob_api.job import GROUP, CPTJob
from cptjob_operator.identity import JOB_UID, ROLE, Role, base, job_labels, owner
from cptjob_operator.objects.pods import HTTP_PORT, STORE_PORT
from cptjob_operator.profile import Profile
from cptjob_operator.settings import Network
from cptjob_trainer.config import AcceptedConfig

Manifest = dict[str, Any]

HASH = f"{GROUP}/hash"
CONFIG_FILE = "config.json"
PROFILE_FILE = "profile.json"
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"


def missing(
    job: CPTJob,
    profile: Profile,
    config: AcceptedConfig | None,
    network: Network,
    there: Mapping[str, str],
) -> tuple[Manifest, ...]:
    """What the job needs beside pods and is not there, or differs from what it should be.

    config: None where the ConfigMap is there; it is never changed, nor could it be.
    there: hash of each child that exists, by its kind.
    """
    found = () if config is None or "ConfigMap" in there else (config_map(job, profile, config),)
    others = (service(job), network_policy(job, network))
    return found + tuple(each for each in others if there.get(each["kind"]) != hash_of(each))


def hash_of(manifest: Manifest) -> str:
    """The hash that a child carries."""
    found: str = manifest["metadata"]["annotations"][HASH]
    return found


def config_map(job: CPTJob, profile: Profile, config: AcceptedConfig) -> Manifest:
    """What was decided at acceptance. Immutable: a change would be a change to a running job."""
    data = {
        CONFIG_FILE: config.model_dump_json(indent=2) + "\n",
        PROFILE_FILE: profile.model_dump_json(indent=2) + "\n",
    }
    return child(job, "v1", "ConfigMap", {"immutable": True, "data": data})


def service(job: CPTJob) -> Manifest:
    """The name under which workers find the coordinator's store."""
    spec = {
        "clusterIP": "None",
        "selector": {JOB_UID: job.metadata.uid, ROLE: str(Role.COORDINATOR)},
        # A coordinator that was replaced is to be found while it prepares: launchers wait for it.
        "publishNotReadyAddresses": True,
        "ports": [
            {"name": "store", "port": STORE_PORT, "targetPort": STORE_PORT, "protocol": "TCP"},
            {"name": "http", "port": HTTP_PORT, "targetPort": HTTP_PORT, "protocol": "TCP"},
        ],
    }
    return child(job, "v1", "Service", {"spec": spec})


def network_policy(job: CPTJob, network: Network) -> Manifest:
    """Who may reach the job's pods: themselves on any port (gloo and NCCL choose theirs at run
    time), the operator and the monitoring for progress and metrics.
    """
    own = {"matchLabels": {JOB_UID: job.metadata.uid}}
    readers: list[Manifest] = [
        {
            "namespaceSelector": _namespace(network.operator_namespace),
            "podSelector": {"matchLabels": dict(network.operator_labels)},
        }
    ]
    if network.monitoring_namespace:
        readers.append({"namespaceSelector": _namespace(network.monitoring_namespace)})
    spec = {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": own}]},
            {"from": readers, "ports": [{"protocol": "TCP", "port": HTTP_PORT}]},
        ],
    }
    return child(job, "networking.k8s.io/v1", "NetworkPolicy", {"spec": spec})


def _namespace(name: str) -> Manifest:
    return {"matchLabels": {_NAMESPACE_LABEL: name}}


def child(
    job: CPTJob, version: str, kind: str, content: Manifest, *, name: str | None = None
) -> Manifest:
    """An object of the job, with its hash. `name`: None is the one that most of them share."""
    of_job, uid = job.metadata.name, job.metadata.uid or ""
    metadata = {
        "name": name or base(of_job, uid),
        "namespace": job.metadata.namespace,
        "labels": job_labels(of_job, uid),
        "ownerReferences": [owner(of_job, uid)],
    }
    manifest = {"apiVersion": version, "kind": kind, "metadata": metadata, **content}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    metadata["annotations"] = {HASH: hashlib.sha256(text.encode()).hexdigest()[:16]}
    return manifest
