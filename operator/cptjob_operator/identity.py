"""Who an object is: the labels that say so, and the names that follow from them.

A pod is (job uid, attempt, role, index, incarnation). Its name is a function of these five, so that
two passes that want the same pod ask for the same name, and the API server lets one of them win.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from cptjob_api.job import API_VERSION, GROUP, KIND

JOB_NAME = f"{GROUP}/job-name"
JOB_UID = f"{GROUP}/job-uid"
ATTEMPT = f"{GROUP}/attempt"
ROLE = f"{GROUP}/role"
INDEX = f"{GROUP}/index"
INCARNATION = f"{GROUP}/incarnation"
#: Annotation of a coordinator: the node that it must be on; see `together.py`.
NODE = f"{GROUP}/node"
#: Annotation of a worker: how many workers its launcher waits for.
NUM_NODES = f"{GROUP}/num-nodes"

MANAGED_BY = "app.kubernetes.io/managed-by"
#: Value of `app.kubernetes.io/managed-by`, field manager, and `spec.managedBy` of our own jobs.
MANAGER = "cptjob-operator"
#: Selects every object that the operator makes, and nothing else; watches and lists use it.
OURS = f"{MANAGED_BY}={MANAGER}"

_UID_CHARACTERS = 5


class Role(StrEnum):
    """What a pod does."""

    COORDINATOR = "coordinator"
    WORKER = "worker"


@dataclass(frozen=True, order=True, slots=True)
class JobKey:
    """Where a job is; a job that was deleted and made again has the same key and another uid."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class JobId(NamedTuple):
    """Which job an object is for. Anybody may write a job's uid into a label, but only in a
    namespace where they have rights: so an object is for a job of its own namespace, or for none.
    """

    namespace: str
    uid: str


@dataclass(frozen=True, order=True, slots=True)
class PodId:
    """Identity of a pod."""

    uid: str
    attempt: int
    role: Role
    index: int
    incarnation: int

    def name(self, job_name: str) -> str:
        """Name of the pod: at most 63 characters for a job name of at most 40.

        The start of the uid keeps pods of a deleted job of the same name out of the way.
        """
        return f"{base(job_name, self.uid)}-{self.attempt}-{self.role[0]}{self.index}-{self.incarnation}"

    def labels(self, job_name: str) -> dict[str, str]:
        return {
            **job_labels(job_name, self.uid),
            ATTEMPT: str(self.attempt),
            ROLE: str(self.role),
            INDEX: str(self.index),
            INCARNATION: str(self.incarnation),
        }

    @staticmethod
    def of(labels: Mapping[str, str]) -> "PodId | None":
        """The identity that the labels say; None when they are not ours."""
        try:
            return PodId(
                labels[JOB_UID],
                int(labels[ATTEMPT]),
                Role(labels[ROLE]),
                int(labels[INDEX]),
                int(labels[INCARNATION]),
            )
        except (KeyError, ValueError):
            return None


def base(job_name: str, uid: str) -> str:
    """Name of the job's ConfigMap, Service and NetworkPolicy, and start of its pods' names."""
    return f"{job_name}-{uid[:_UID_CHARACTERS]}"


def job_labels(job_name: str, uid: str) -> dict[str, str]:
    """Labels of every object of the job."""
    return {MANAGED_BY: MANAGER, JOB_NAME: job_name, JOB_UID: uid}


def owner(job_name: str, uid: str) -> dict[str, Any]:
    """The owner reference of every object of the job: it goes when the job goes."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job_name,
        "uid": uid,
        "controller": True,
        # Who deletes the job in the foreground need not wait for anything else.
        "blockOwnerDeletion": True,
    }


def worker_selector(job_name: str, uid: str) -> str:
    """Label selector of the job's workers, as `kubectl scale` and an autoscaler use it."""
    return f"{JOB_UID}={uid},{ROLE}={Role.WORKER}"
