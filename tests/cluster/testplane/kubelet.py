"""Playing the kubelet: what becomes of one pod, as the test wants it.

Pods with the annotation `testplane/kubelet: manual`, and all pods of namespaces whose names begin
with `manual-`, wait for this. It also works on pods that KWOK runs: KWOK never takes a status back.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kubernetes import client

EXIT_CODE, MESSAGE = "testplane/exit-code", "testplane/message"
IMAGE_ID = "test.invalid/image@sha256:" + "0" * 64


class Kubelet:
    """Sets the status of pods."""

    def __init__(self, api: client.ApiClient) -> None:
        self._core = client.CoreV1Api(api)

    def run(self, namespace: str, name: str, *, ready: bool = True, ip: str = "10.0.0.1") -> None:
        """Its containers run; not `ready`, its readiness probe does not answer yet."""
        state = {"running": {"startedAt": _now()}}
        self._patch(
            namespace,
            name,
            {
                "phase": "Running",
                "startTime": _now(),
                "podIP": ip,
                "podIPs": [{"ip": ip}],
                "conditions": _conditions(ready),
                "containerStatuses": self._containers(namespace, name, state, ready),
            },
        )

    def wait_for(self, namespace: str, name: str, reason: str, message: str = "") -> None:
        """A container cannot start: ImagePullBackOff, CreateContainerConfigError and their like."""
        state = {"waiting": {"reason": reason, "message": message}}
        containers = self._containers(namespace, name, state, ready=False)
        self._patch(namespace, name, {"phase": "Pending", "containerStatuses": containers})

    def exit(
        self,
        namespace: str,
        name: str,
        code: int,
        message: str = "",
        *,
        reason: str | None = None,
        pod_reason: str | None = None,
        conditions: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Its containers ended with this code and termination message.

        reason: of the containers, such as OOMKilled. pod_reason: of the pod, such as Evicted.
        conditions: more conditions of the pod, such as DisruptionTarget.
        """
        ended = {
            "exitCode": code,
            "message": message,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        state = {"terminated": ended}
        more = [{"lastTransitionTime": _now(), **each} for each in conditions]
        self._patch(
            namespace,
            name,
            {
                "phase": "Succeeded" if code == 0 else "Failed",
                "reason": pod_reason,
                "conditions": [*_conditions(ready=False), *more],
                "containerStatuses": self._containers(namespace, name, state, ready=False),
            },
        )

    def finish(self, namespace: str, name: str) -> None:
        """The pod is gone: what a kubelet does when the containers of a deleted pod have ended."""
        self._core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)

    def _containers(
        self, namespace: str, name: str, state: Mapping[str, Any], ready: bool
    ) -> list[dict[str, Any]]:
        pod = self._core.read_namespaced_pod(name, namespace)
        return [
            {
                "name": each.name,
                "image": each.image,
                "imageID": IMAGE_ID,
                "ready": ready,
                "started": "running" in state,
                "restartCount": 0,
                "state": dict(state),
            }
            for each in pod.spec.containers
        ]

    def _patch(self, namespace: str, name: str, status: Mapping[str, Any]) -> None:
        self._core.patch_namespaced_pod_status(name, namespace, {"status": status})


def _conditions(ready: bool) -> list[dict[str, str]]:
    status = "True" if ready else "False"
    return [
        {"type": "Initialized", "status": "True", "lastTransitionTime": _now()},
        {"type": "ContainersReady", "status": status, "lastTransitionTime": _now()},
        {"type": "Ready", "status": status, "lastTransitionTime": _now()},
    ]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
