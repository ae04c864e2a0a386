"""The kinds of objects that the operator touches, and where the API server keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cptjob_api.job import API_VERSION, KIND, PLURAL


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: its version of the API, its name, and the plural that stands in paths."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """Path of one object, or of all: without a namespace those of every namespace."""
        root = "/apis" if "/" in self.api_version else "/api"
        parts = [root, self.api_version]
        if namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


JOB = Kind(API_VERSION, KIND, PLURAL)
POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SERVICE = Kind("v1", "Service", "services")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")

#: What a job owns beside its pods. Nobody watches these: they are listed.
CHILDREN = (CONFIG_MAP, SERVICE, NETWORK_POLICY, DEPLOYMENT)
_BY_NAME = {each.name: each for each in (JOB, POD, *CHILDREN)}


def kind(name: str) -> Kind:
    """The kind of that name. Raises KeyError for one that the operator never makes."""
    return _BY_NAME[name]


def kind_of(manifest: Mapping[str, Any]) -> Kind:
    """The kind of a manifest."""
    return kind(str(manifest["kind"]))
