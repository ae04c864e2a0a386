"""Everything that is in a namespace: what a test compares, and what must not be left behind."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from kubernetes import client

#: The control plane's own words about objects, and the operator's lease.
_NOT_OBJECTS = frozenset({"events", "leases", "endpoints", "endpointslices"})

#: A ConfigMap that the control plane puts there sooner or later.
_OF_EVERY_NAMESPACE = "kube-root-ca.crt"


class Thing(NamedTuple):
    """An object as far as every kind has one. owners: uids."""

    kind: str
    name: str
    uid: str
    owners: tuple[str, ...]


class Inventory:
    """What a namespace holds beside what was there when the inventory was made."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._before = {each.uid for each in self._all()}

    def things(self) -> list[Thing]:
        return [each for each in self._all() if each.uid not in self._before]

    def _all(self) -> Iterator[Thing]:
        for group, plural, kind in _kinds(self._api):
            path = f"{group}/namespaces/{self._namespace}/{plural}"
            for each in _get(self._api, path)["items"]:
                about = each["metadata"]
                if about["name"] == _OF_EVERY_NAMESPACE:
                    continue
                owners = tuple(owner["uid"] for owner in about.get("ownerReferences", []))
                yield Thing(kind, about["name"], about["uid"], owners)


@cache
def _kinds(api: client.ApiClient) -> list[tuple[str, str, str]]:
    """Path of the group, plural name and kind of all that can be listed in a namespace."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for group in ["/api/v1", *_groups(api)]:
        for each in _get(api, group)["resources"]:
            listed = each["namespaced"] and "list" in each["verbs"]
            if listed and each["name"] not in _NOT_OBJECTS:
                # Of a kind that is served in several versions, the preferred one comes first.
                found.setdefault((group.split("/")[2], each["name"]), (group, each["kind"]))
    return [(group, plural, kind) for (_, plural), (group, kind) in found.items()]


def _groups(api: client.ApiClient) -> list[str]:
    return [
        f"/apis/{each['preferredVersion']['groupVersion']}" for each in _get(api, "/apis")["groups"]
    ]


def _get(api: client.ApiClient, path: str) -> Any:
    return api.call_api(
        path,
        "GET",
        response_types_map={200: "object"},
        auth_settings=["BearerToken"],
        _return_http_data_only=True,
    )
