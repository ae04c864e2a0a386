"""The rights that the chart gives the operator: granted, taken away one by one, and audited."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kubernetes import client

from helmchart import NAME, Helm
from testplane.plane import ControlPlane

Object = dict[str, Any]
_KINDS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


class Right(NamedTuple):
    """One verb on one resource: ("pods", "create"), ("cptjobs/status", "patch")."""

    resource: str
    verb: str


#: Nothing is asked of it: the admission plugin looks for it when an object is made.
FINALIZERS = Right("cptjobs/finalizers", "update")


class Audit:
    """What the API server writes down of the requests of service accounts: see `flags`."""

    def __init__(self, folder: Path) -> None:
        self._policy, self.log = folder / "audit-policy.json", folder / "audit.log"

    def flags(self) -> list[str]:
        """For the API server; writes the policy that they name."""
        rules = [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}
        self._policy.write_text(json.dumps(policy | {"omitStages": ["RequestReceived"]}))
        return [f"--audit-policy-file={self._policy}", f"--audit-log-path={self.log}"]

    def used(self, namespace: str) -> set[Right]:
        """Rights that the operator of that namespace used, there or in the cluster."""
        return {_asked(event) for event in self._events(namespace) if not _refused(event)}

    def refused(self, namespace: str) -> set[Right]:
        """Rights that it was found to lack."""
        return {
            FINALIZERS if _decision(event) == _ALLOWED else _asked(event)
            for event in self._events(namespace)
            if _refused(event)
        }

    def _events(self, namespace: str) -> Iterator[Object]:
        user = f"system:serviceaccount:{namespace}:{NAME}"
        for line in self.log.read_text("utf-8").splitlines():
            event = json.loads(line) if user in line else {}
            if event.get("objectRef", {}).get("resource"):
                where = event["objectRef"].get("namespace")
                if event["user"]["username"] == user and where in (None, namespace):
                    yield event


_ALLOWED = "allow"


def _decision(event: Object) -> str:
    return str(event["annotations"]["authorization.k8s.io/decision"])


def _asked(event: Object) -> Right:
    about = event["objectRef"]
    return Right(
        "/".join(filter(None, (about["resource"], about.get("subresource")))), event["verb"]
    )


def _refused(event: Object) -> bool:
    """By the authorizer, or by the plugin that guards owner references; not by a quota."""
    if _decision(event) != _ALLOWED:
        return True
    return "blockOwnerDeletion" in event["responseStatus"].get("message", "")


class Grant:
    """The chart's service account, roles and bindings for one namespace.

    everywhere: jobs of all namespaces are looked after, by a role of the cluster.
    """

    def __init__(
        self, plane: ControlPlane, helm: Helm, namespace: str, *, everywhere: bool = False
    ) -> None:
        self._plane, self._namespace = plane, namespace
        values = {
            "settings": {"watchedNamespaces": [] if everywhere else [namespace]},
            "rbac": {"aggregate": False},
        }
        rendered = helm.template(values, namespace=namespace)
        self._objects = [each for each in rendered if each["kind"] in _KINDS]
        self.rights = {
            Right(resource, verb)
            for each in self._objects
            for rule in each.get("rules", ())
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        self.give()

    def token(self) -> str:
        """Of the service account."""
        return self._plane.token_of(self._namespace, NAME)

    def give(self, without: Right | None = None) -> None:
        """Everything, or all but one right. Returns when the API server goes by it."""
        objects = [_without(each, without) for each in self._objects]
        manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self._plane.kubectl("apply", "-f", "-", stdin=manifest)
        with self._plane.api() as api:
            reviews = client.AuthorizationV1Api(api)
            for right in self.rights:
                wanted = right != without
                self._plane.wait(
                    lambda right=right, wanted=wanted: self._has(reviews, right) == wanted,
                    f"{right} to be {'given' if wanted else 'taken away'}",
                )

    def take_away(self) -> None:
        """What is not in the namespace, and so does not go with it."""
        for each in self._objects:
            if "namespace" not in each["metadata"]:
                self._plane.kubectl("delete", each["kind"], each["metadata"]["name"])

    def _has(self, reviews: client.AuthorizationV1Api, right: Right) -> bool:
        resource, _, subresource = right.resource.partition("/")
        attributes = {
            "verb": right.verb,
            "group": self._group(right.resource),
            "resource": resource,
            "subresource": subresource,
            "name": NAME if resource == "leases" else "",
            "namespace": "" if resource == "nodes" else self._namespace,
        }
        user = f"system:serviceaccount:{self._namespace}:{NAME}"
        answer = reviews.create_subject_access_review(
            {"spec": {"user": user, "resourceAttributes": attributes}}
        )
        return bool(answer.status.allowed)

    def _group(self, resource: str) -> str:
        (group,) = {
            rule["apiGroups"][0]
            for each in self._objects
            for rule in each.get("rules", ())
            if resource in rule["resources"]
        }
        return str(group)


def _without(found: Object, right: Right | None) -> Object:
    """The object without that right, if it is a role that gives it."""
    if right is None or "rules" not in found:
        return found
    rules = [
        rule | {"verbs": [verb for verb in rule["verbs"] if verb != right.verb]}
        if right.resource in rule["resources"]
        else rule
        for rule in found["rules"]
    ]
    return found | {"rules": [rule for rule in rules if rule["verbs"]]}
