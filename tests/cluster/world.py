"""One namespace as a test of the operator sees it: its jobs, their objects, a kubelet by hand."""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from kubernetes import client

from job_cases import sound_job
from testplane.kubelet import Kubelet
from testplane.plane import ControlPlane

OURS = "app.kubernetes.io/managed-by=cptjob-operator"
#: Of a job whose curves TensorBoard shows.
SHOWN = {"spec.tracking.tensorBoard": True}


class World:
    """One namespace with its claims. In most, pods do only what the test makes them do."""

    def __init__(self, plane: ControlPlane, api: client.ApiClient, namespace: str) -> None:
        self.plane, self.namespace = plane, namespace
        self.core, self.custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self.kubelet = Kubelet(api)
        self._kind = {"group": "training.cptjob.io", "version": "v1alpha1", "plural": "cptjobs"}
        for name in ("models", "data", "results"):
            self.claim(name)

    def claim(self, name: str, mode: str = "ReadWriteMany") -> None:
        """A claim with a volume, so that the scheduler has nothing against pods that mount it."""
        storage, about = "1Gi", {"name": name, "namespace": self.namespace}
        common = {"accessModes": [mode], "storageClassName": ""}
        volume = {
            "capacity": {"storage": storage},
            "claimRef": about,
            "nfs": {"server": "test.invalid", "path": "/"},
        }
        self.core.create_persistent_volume(
            {"metadata": {"name": f"{self.namespace}-{name}"}, "spec": common | volume}
        )
        self.core.create_namespaced_persistent_volume_claim(
            self.namespace,
            {
                "metadata": about,
                "spec": common | {"resources": {"requests": {"storage": storage}}},
            },
        )

    def create(
        self, name: str, workers: int = 1, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A job with these fields changed, by their paths: {"spec.suspend": True}."""
        body = sound_job(
            {
                "metadata.name": name,
                "spec.output.storageUri": "pvc://results/runs",
                "spec.trainer": {"numNodes": workers, "numProcPerNode": 1},
                **(changes or {}),
            }
        )
        created: dict[str, Any] = self.custom.create_namespaced_custom_object(
            **self._kind, namespace=self.namespace, body=body
        )
        return created

    def delete(self, name: str) -> None:
        self.custom.delete_namespaced_custom_object(
            **self._kind, namespace=self.namespace, name=name
        )

    def patch(self, name: str, change: dict[str, Any]) -> None:
        self.custom.patch_namespaced_custom_object(
            **self._kind, namespace=self.namespace, name=name, body=change
        )

    def scale(self, name: str, replicas: int | None = None) -> dict[str, Any]:
        """The job's scale, changed first when `replicas` are given."""
        where = {**self._kind, "namespace": self.namespace, "name": name}
        if replicas is not None:
            self.custom.patch_namespaced_custom_object_scale(
                **where, body={"spec": {"replicas": replicas}}
            )
        found: dict[str, Any] = self.custom.get_namespaced_custom_object_scale(**where)
        return found

    def find(self, name: str) -> dict[str, Any] | None:
        """The job, or None when it is gone."""
        try:
            return self.job(name)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.custom.get_namespaced_custom_object(
            **self._kind, namespace=self.namespace, name=name
        )
        return found

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.status(name).get("conditions") or []
        return next((each for each in conditions if each["type"] == kind), {})

    def says(self, name: str, reason: str, *words: str) -> bool:
        """Whether the job is not ready for that reason, with these words, as an Event says too."""
        ready = self.condition(name, "Ready")
        return (
            ready.get("reason") == reason
            and all(word in ready["message"] for word in words)
            and self.told(name, reason, *words)
        )

    def told(self, name: str, reason: str, *words: str) -> bool:
        """Whether an Event on the job has that reason and these words."""
        return any(
            event.reason == reason and all(word in event.message for word in words)
            for event in self.events(name)
        )

    def events(self, name: str) -> list[Any]:
        """Events on the job."""
        listed = self.core.list_namespaced_event(self.namespace).items
        return [each for each in listed if each.involved_object.name == name]

    def pods(self, role: str = "worker", job: str | None = None) -> list[Any]:
        selector = f"{OURS},training.cptjob.io/role={role}"
        if job:
            selector += f",training.cptjob.io/job-name={job}"
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def children(self) -> list[Any]:
        """What jobs own beside their pods."""
        api = self.core.api_client
        lists = (
            self.core.list_namespaced_config_map,
            self.core.list_namespaced_service,
            client.NetworkingV1Api(api).list_namespaced_network_policy,
            client.AppsV1Api(api).list_namespaced_deployment,
        )
        return [each for all_ in lists for each in all_(self.namespace, label_selector=OURS).items]

    def shown(self, name: str) -> list[Any]:
        """What shows the curves of a job: a Service, a NetworkPolicy, a Deployment."""
        return [each for each in self.children() if each.metadata.name == f"{name}-tensorboard"]

    def wait(self, happened: Callable[[], object], what: str) -> None:
        self.plane.wait(happened, what)

    def prepare(self, *names: str) -> None:
        """The coordinators of these jobs are done with preparing."""
        for name in names:
            self.wait(lambda name=name: self._coordinator(name), f"the coordinator of {name}")
            self.kubelet.run(self.namespace, self._coordinator(name)[0].metadata.name)

    def run(self, name: str, workers: int) -> None:
        """Its workers run, when there are so many that shall live on; returns when the job does."""
        self.wait(lambda: len(self.living(name)) == workers, f"{workers} workers of {name}")
        for pod in self.living(name):
            self.kubelet.run(self.namespace, pod.metadata.name)
        self.wait(lambda: self.status(name).get("phase") == "Running", f"{name} to run")

    def complete(self, name: str, report: Mapping[str, Any] | None = None) -> None:
        """Its coordinator ends as one does whose model is written; `report` is its last word."""
        said = {"exitCode": 0, "reason": "Complete", "message": json.dumps(report or {})}
        (pod,) = self._coordinator(name)
        self.kubelet.exit(self.namespace, pod.metadata.name, 0, json.dumps(said))

    def suspend(self, name: str, on: bool = True) -> None:
        """Returns when it is suspended; at once when it shall go on."""
        self.patch(name, {"spec": {"suspend": on}})
        if on:
            self.wait(lambda: self._suspended(name), f"{name} to be suspended")

    def _suspended(self, name: str) -> bool:
        self.finish_what_leaves(name)
        return self.status(name).get("phase") == "Suspended"

    def living(self, name: str) -> list[Any]:
        """The job's workers that have not ended and are not about to."""
        return [
            pod
            for pod in self.pods("worker", name)
            if pod.metadata.deletion_timestamp is None
            and pod.status.phase not in ("Succeeded", "Failed")
        ]

    def finish_what_leaves(self, *jobs: str) -> bool:
        """Plays the kubelet of pods that were asked to go; true when there was none.

        jobs: whose; all when none is named.
        """
        leaving = [
            pod.metadata.name
            for role in ("coordinator", "worker")
            for job in jobs or (None,)
            for pod in self.pods(role, job)
            if pod.metadata.deletion_timestamp is not None
        ]
        for name in leaving:
            with contextlib.suppress(client.exceptions.NotFoundException):
                self.kubelet.finish(self.namespace, name)
        return not leaving

    def _coordinator(self, name: str) -> list[Any]:
        return self.pods("coordinator", name)
