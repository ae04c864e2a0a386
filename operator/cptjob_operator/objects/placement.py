"""Which nodes a worker may go to: as affinity for the scheduler, and as words for people. Pure.

A node that is named by hand is reached by affinity too, never by `nodeName`: the scheduler goes on
checking resources, taints and volumes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cptjob_api.conditions import Reason
from cptjob_operator.identity import JOB_UID, ROLE, Role
from cptjob_operator.observed import Node
from cptjob_operator.profile import Placement, Profile

INSTANCE_LABEL = "node.kubernetes.io/instance-type"
HOST_LABEL = "kubernetes.io/hostname"

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """Why workers cannot all be placed. The message names the node and its fault."""

    reason: Reason
    message: str


# --- for the scheduler ----------------------------------------------------------------------------


def worker_affinity(
    profile: Profile,
    uid: str,
    *,
    near: str | None = None,
    soft: Collection[str] = (),
    hard: Collection[str] = (),
) -> dict[str, Any]:
    """Affinity of a worker.

    near: the node to go to where possible. soft, hard: nodes to avoid where possible, and at any
    price.
    """
    affinity: dict[str, Any] = {"nodeAffinity": _nodes_of_workers(profile.placement, hard)}
    preferred = [_name("In", near)] if near else []
    preferred += [_name("NotIn", node) for node in sorted(soft)]
    if preferred:
        affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": {"matchFields": [field]}} for field in preferred
        ]
    if profile.placement.mode == "Manual":
        # One worker a node. The coordinator asks for little and may sit beside one.
        affinity["podAntiAffinity"] = _required(_pods_of(uid, role=Role.WORKER))
    return affinity


def coordinator_affinity(
    profile: Profile,
    *,
    beside: bool = False,
    node: str | None = None,
    hard: Collection[str] = (),
) -> dict[str, Any]:
    """Affinity of a coordinator: away from the pool's nodes where possible.

    beside: it shares a node with its worker, so it goes where the worker can go. node: the one that
    the worker is on, whatever became of its labels. hard: nodes to avoid at any price.
    """
    if node is not None:
        return {"nodeAffinity": _one_of({"matchFields": [_name("In", node)]})}
    if beside:
        return {"nodeAffinity": _nodes_of_workers(profile.placement, hard)}
    away = {"matchExpressions": [{"key": profile.placement.label_key, "operator": "DoesNotExist"}]}
    return {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": away}]
        }
    }


def tolerations(profile: Profile) -> list[dict[str, Any]]:
    """Taints that the job's pods tolerate: those of the pool, and for a short while a lost node."""
    found: list[dict[str, Any]] = []
    for each in profile.placement.tolerations:
        tolerated: dict[str, Any] = {"key": each.key, "operator": each.operator}
        if each.operator == "Equal":
            tolerated["value"] = each.value
        if each.effect:
            tolerated["effect"] = each.effect
        found.append(tolerated)
    return found + [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": profile.placement.toleration_seconds,
        }
        for state in ("not-ready", "unreachable")
    ]


def node_selector(profile: Profile) -> dict[str, str]:
    """Labels that nodes named by hand must have. Said once here, and not once for each node."""
    if profile.placement.mode == "Auto":
        return {}
    return {key: values[0] for key, values in _demands(profile.placement) if len(values) == 1}


def _nodes_of_workers(placement: Placement, hard: Collection[str]) -> dict[str, Any]:
    """Required node affinity: one term for any node of the pool, or one for each that is named."""
    by_hand = placement.mode == "Manual"
    expressions = [
        {"key": key, "operator": "In", "values": list(values)}
        for key, values in _demands(placement)
        if not by_hand or len(values) > 1
    ]
    common = {"matchExpressions": expressions} if expressions else {}
    if by_hand:
        # The API server takes one value for a field, and one of the terms must hold.
        names = [name for name in placement.node_names if name not in hard]
        terms = [
            common | {"matchFields": [_name("In", name)]} for name in names or placement.node_names
        ]
    else:
        fields = [_name("NotIn", node) for node in sorted(hard)]
        terms = [common | ({"matchFields": fields} if fields else {})]
    return _one_of(*terms)


def _one_of(*terms: dict[str, Any]) -> dict[str, Any]:
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)}}


def _demands(placement: Placement) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels that a node must have, with the values that will do."""
    yield placement.label_key, (placement.label_value,)
    if placement.products:
        yield placement.product_label_key, placement.products
    if placement.instance_type:
        yield INSTANCE_LABEL, (placement.instance_type,)
    for key, value in placement.node_selector.items():
        yield key, (value,)


def _name(operator: str, node: str) -> dict[str, Any]:
    return {"key": "metadata.name", "operator": operator, "values": [node]}


def _pods_of(uid: str, role: Role | None = None) -> dict[str, Any]:
    labels = {JOB_UID: uid} | ({ROLE: str(role)} if role else {})
    return {"labelSelector": {"matchLabels": labels}, "topologyKey": HOST_LABEL}


def _required(term: dict[str, Any]) -> dict[str, Any]:
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}


# --- for people -----------------------------------------------------------------------------------


def check(
    profile: Profile,
    num_nodes: int,
    nodes: Mapping[str, Node],
    used_gpus: Mapping[str, int] | None,
    excluded: Collection[str] = (),
) -> list[Problem]:
    """What keeps `num_nodes` workers from being placed; empty when nothing that can be seen does.

    used_gpus: GPUs in use by node; None when nobody may look. excluded: nodes that failed.
    """
    if profile.placement.mode == "Auto":
        return _check_pool(profile, num_nodes, nodes, used_gpus, excluded)
    named = profile.placement.node_names
    found = [(name, _faults(profile, nodes.get(name), used_gpus)) for name in named]
    sound = sum(not faults and name not in excluded for name, faults in found)
    if sound >= num_nodes:
        return []
    return [
        Problem(Reason.WAITING_FOR_NODE, f"node {name} {' and '.join(faults)}")
        for name, faults in found
        if faults
    ] or [_too_few_left(len(named) - sound, num_nodes)]


def unoffered(profile: Profile, nodes: Mapping[str, Node]) -> list[Problem]:
    """Devices that workers ask for and no node of the pool has, as when a name is misspelt."""
    own = [node for node in nodes.values() if _in_pool(profile.placement, node)]
    offered = {name for node in own for name, count in node.gpus.items() if count}
    missing = sorted(name for name in profile.worker.limits if "/" in name and name not in offered)
    if not own or not missing:
        return []
    where = f"pool {profile.placement.pool}"
    there = f"its nodes offer {', '.join(sorted(offered))}" if offered else "its nodes offer none"
    return [
        Problem(Reason.WAITING_FOR_POOL, f"no node of {where} offers {', '.join(missing)}; {there}")
    ]


def fitting(profile: Profile, nodes: Mapping[str, Node]) -> list[str]:
    """Nodes that would do for a worker if nobody else used their GPUs."""
    return [name for name, node in nodes.items() if not _faults(profile, node, None)]


def affordable(
    profile: Profile, num_nodes: int, nodes: Mapping[str, Node], excluded: Iterable[str]
) -> tuple[str, ...]:
    """Those of `excluded` that workers can do without, the first ones first.

    Enough nodes are always left: a node that failed is better than none.
    """
    kept: list[str] = []
    for name in excluded:
        if _room(profile, nodes, {*kept, name}) >= num_nodes:
            kept.append(name)
    return tuple(kept)


def _room(profile: Profile, nodes: Mapping[str, Node], without: Collection[str]) -> int:
    """Workers that fit on the nodes that may be used, whoever uses their GPUs now."""
    by_hand = profile.placement.mode == "Manual"
    names = profile.placement.node_names if by_hand else nodes
    sound = [
        nodes[name]
        for name in names
        if name not in without and not _faults(profile, nodes.get(name), None)
    ]
    return len(sound) if by_hand else sum(_workers_on(profile, node, None) for node in sound)


def _too_few_left(avoided: int, num_nodes: int) -> Problem:
    return Problem(
        Reason.WAITING_FOR_NODE,
        f"{avoided} of the named nodes are avoided because pods failed there, and {num_nodes} are "
        "needed; name another in a new job, or wait until they are tried again",
    )


def _check_pool(
    profile: Profile,
    num_nodes: int,
    nodes: Mapping[str, Node],
    used_gpus: Mapping[str, int] | None,
    excluded: Collection[str],
) -> list[Problem]:
    """Of the pool's nodes: how many fit, how many are needed, and why the others do not."""
    placement = profile.placement
    own = [node for node in nodes.values() if _in_pool(placement, node)]
    where = f"pool {placement.pool}"
    if not own:
        label = f"{placement.label_key}={placement.label_value}"
        return [Problem(Reason.WAITING_FOR_POOL, f"{where} has no nodes: none carries {label}")]
    unfit: dict[str, list[str]] = {}
    room = 0
    for node in sorted(own, key=lambda node: node.name):
        faults = _faults(profile, node, used_gpus)
        if node.name in excluded:
            faults = [*faults, "is avoided because pods failed there"]
        for fault in faults[:1]:
            unfit.setdefault(fault, []).append(node.name)
        room += 0 if faults else _workers_on(profile, node, used_gpus)
    if room >= num_nodes:
        return []
    why = "; ".join(f"{_some(names)}: {fault}" for fault, names in unfit.items())
    message = f"{where} has room for {room} of {num_nodes} workers"
    if used_gpus is None and profile.gpus_per_node:
        message += " while nothing else uses its GPUs"
    message += f"; {why}" if why else ""
    return [Problem(Reason.WAITING_FOR_POOL, message)]


def _workers_on(profile: Profile, node: Node, used_gpus: Mapping[str, int] | None) -> int:
    """Workers that a sound node has GPUs for; of one that needs none, as many as there may be."""
    if not profile.gpus_per_node:
        return 500
    free = node.gpus.get(profile.gpu_resource, 0) - (used_gpus or {}).get(node.name, 0)
    return free // profile.gpus_per_node


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"


def _in_pool(placement: Placement, node: Node) -> bool:
    return node.labels.get(placement.label_key) == placement.label_value


def _faults(profile: Profile, node: Node | None, used_gpus: Mapping[str, int] | None) -> list[str]:
    """What is wrong with a node for a worker, the plainest first."""
    if node is None:
        return ["does not exist"]
    return list(_faults_of(profile, node, used_gpus))


def _faults_of(profile: Profile, node: Node, used_gpus: Mapping[str, int] | None) -> Iterator[str]:
    placement = profile.placement
    if not node.ready:
        yield "is not ready"
    if node.cordoned:
        yield "is cordoned"
    if not _in_pool(placement, node):
        yield (
            f"is not in pool {placement.pool} (label {placement.label_key}="
            f"{placement.label_value} is missing)"
        )
    for key, values in list(_demands(placement))[1:]:
        value = node.labels.get(key)
        if value not in values:
            yield f"has {key}={value or 'nothing'} and not {' or '.join(values)}"
    yield from _missing_gpus(profile, node, used_gpus)


def _missing_gpus(
    profile: Profile, node: Node, used_gpus: Mapping[str, int] | None
) -> Iterator[str]:
    wanted, there = profile.gpus_per_node, node.gpus.get(profile.gpu_resource, 0)
    if there < wanted:
        yield f"has {there} {profile.gpu_resource} and {wanted} are wanted"
    elif used_gpus is not None and there - used_gpus.get(node.name, 0) < wanted:
        free = max(0, there - used_gpus.get(node.name, 0))
        yield f"has {free} of {there} {profile.gpu_resource} free and {wanted} are wanted"
