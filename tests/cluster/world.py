"""One namespace as a test of the operator sees it: its jobs, their objects, a kubelet by hand."""

from collections.abc import Callable
from typing import Any

from kubernetes import client

from testplane.kubelet import Kubelet
from testplane.plane import ControlPlane

OURS = "app.kubernetes.io/managed-by=cptjob-operator"


class World:
    """One namespace whose pods do only what the test makes them do, with its claims."""

    def __init__(self, plane: ControlPlane, api: client.ApiClient, namespace: str) -> None:
        self.plane, self.namespace = plane, namespace
        self.core, self.custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self.kubelet = Kubelet(api)
        self._kind = {"group": "training.cptjob.io", "version": "v1alpha1", "plural": "cptjobs"}
        for name in ("models", "data", "results"):
            claim = {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "resources": {"requests": {"storage": "1Gi"}},
            }
            self.core.create_namespaced_persistent_volume_claim(
                namespace, {"metadata": {"name": name}, "spec": claim}
            )

    def create(self, name: str, workers: int = 1) -> dict[str, Any]:
        spec = {
            "task": "CausalLM",
            "model": {"storageUri": "pvc://models/tiny"},
            "datasets": [{"name": "domain", "storageUri": "pvc://data/domain"}],
            "output": {"storageUri": "pvc://results/runs"},
            "trainer": {"numNodes": workers, "numProcPerNode": 1},
        }
        created: dict[str, Any] = self.custom.create_namespaced_custom_object(
            **self._kind,
            namespace=self.namespace,
            body={
                "apiVersion": "training.cptjob.io/v1alpha1",
                "kind": "CPTJob",
                "metadata": {"name": name},
                "spec": spec,
            },
        )
        return created

    def patch(self, name: str, change: dict[str, Any]) -> None:
        self.custom.patch_namespaced_custom_object(
            **self._kind, namespace=self.namespace, name=name, body=change
        )

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

    def pods(self, role: str = "worker") -> list[Any]:
        selector = f"{OURS},training.cptjob.io/role={role}"
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def children(self) -> list[Any]:
        """ConfigMaps, Services and NetworkPolicies of jobs."""
        network = client.NetworkingV1Api(self.core.api_client)
        lists = (
            self.core.list_namespaced_config_map,
            self.core.list_namespaced_service,
            network.list_namespaced_network_policy,
        )
        return [each for all_ in lists for each in all_(self.namespace, label_selector=OURS).items]

    def wait(self, happened: Callable[[], object], what: str) -> None:
        self.plane.wait(happened, what)

    def prepare(self, *names: str) -> None:
        """The coordinators of these jobs are done with preparing."""
        for name in names:
            self.wait(lambda name=name: self._coordinator(name), f"the coordinator of {name}")
            self.kubelet.run(self.namespace, self._coordinator(name)[0].metadata.name)

    def _coordinator(self, name: str) -> list[Any]:
        return [
            pod
            for pod in self.pods("coordinator")
            if pod.metadata.labels["training.cptjob.io/job-name"] == name
        ]
