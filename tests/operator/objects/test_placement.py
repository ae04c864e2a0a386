"""Where workers may go, and why they cannot: every node by its name and fault."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cptjob_api.conditions import Reason
from cptjob_operator.objects import placement
from cptjob_operator.objects.placement import check
from cptjob_operator.observed import Node
from cptjob_operator.plan.accept import Accepted
from cptjob_operator.profile import Profile
from cptjob_operator.settings import parse

Accept = Callable[..., Accepted]

GPU, POOL = "nvidia.com/gpu", "training.cptjob.io/pool"
PLATFORM = parse("pools: {gold: {gpuProducts: [H100, H200]}}")
LABELS = {POOL: "gold", "nvidia.com/gpu.product": "H100"}


def node(name: str, gpus: int = 8, **changes: Any) -> Node:
    given = {"labels": LABELS, "ready": True, "cordoned": False, "fenced": False}
    return Node(name=name, gpus={GPU: gpus}, **given | changes)


def nodes(*each: Node) -> dict[str, Node]:
    return {one.name: one for one in each}


@pytest.fixture(name="auto")
def profile_of_auto(accepted: Accept) -> Profile:
    return accepted(
        {"spec.trainer.resourcesPerNode": {"limits": {GPU: 4}}, "spec.trainer.numNodes": 2},
        PLATFORM,
    ).profile


@pytest.fixture(name="manual")
def profile_of_manual(accepted: Accept) -> Profile:
    return accepted(
        {
            "spec.trainer": {"numNodes": 2, "resourcesPerNode": {"limits": {GPU: 4}}},
            "spec.scheduling": {
                "mode": "Manual",
                "nodeNames": ["a", "b"],
                "instanceType": "big",
            },
        },
        PLATFORM,
    ).profile


# --- for people -----------------------------------------------------------------------------------

BIG = LABELS | {"node.kubernetes.io/instance-type": "big"}
FAULTS: list[tuple[Node | None, dict[str, int] | None, str]] = [
    (None, None, "node b does not exist"),
    (node("b", labels=BIG, ready=False), None, "node b is not ready"),
    (node("b", labels=BIG, cordoned=True), None, "node b is cordoned"),
    (
        node("b", labels={key: value for key, value in BIG.items() if key != POOL}),
        None,
        f"node b is not in pool gold (label {POOL}=gold is missing)",
    ),
    (
        node("b", labels=BIG | {"nvidia.com/gpu.product": "T4"}),
        None,
        "node b has nvidia.com/gpu.product=T4 and not H100 or H200",
    ),
    (
        node("b", labels=LABELS),
        None,
        "node b has node.kubernetes.io/instance-type=nothing and not big",
    ),
    (node("b", labels=BIG, gpus=2), None, "node b has 2 nvidia.com/gpu and 4 are wanted"),
    (
        node("b", labels=BIG),
        {"b": 6},
        "node b has 2 of 8 nvidia.com/gpu free and 4 are wanted",
    ),
    (
        node("b", labels=BIG, ready=False, cordoned=True),
        None,
        "node b is not ready and is cordoned",
    ),
]


@pytest.mark.parametrize(("other", "used", "message"), FAULTS, ids=[each for *_, each in FAULTS])
def test_a_node_named_by_hand_is_told_with_its_fault(
    other: Node | None, used: dict[str, int] | None, message: str, manual: Profile
) -> None:
    there = nodes(node("a", labels=BIG), *([other] if other else []))
    (problem,) = check(manual, 2, there, used)
    assert (problem.reason, problem.message) == (Reason.WAITING_FOR_NODE, message)


def test_nothing_is_said_of_nodes_that_fit(manual: Profile, auto: Profile) -> None:
    there = nodes(node("a", labels=BIG), node("b", labels=BIG))
    assert check(manual, 2, there, {"a": 4}) == []
    assert check(auto, 2, there, None) == []


def test_more_names_than_workers_leave_room_for_a_broken_node(manual: Profile) -> None:
    there = nodes(node("a", labels=BIG))
    assert check(manual, 1, there, None) == []


def test_named_nodes_that_are_avoided_are_told(manual: Profile) -> None:
    there = nodes(node("a", labels=BIG), node("b", labels=BIG))
    (problem,) = check(manual, 2, there, None, excluded={"b"})
    assert problem.message.startswith("1 of the named nodes are avoided because pods failed there")


def test_a_pool_without_nodes_is_told_by_its_label(auto: Profile) -> None:
    (problem,) = check(auto, 2, nodes(node("a", labels={})), None)
    assert problem.reason is Reason.WAITING_FOR_POOL
    assert problem.message == f"pool gold has no nodes: none carries {POOL}=gold"


def test_a_pool_with_too_few_nodes_says_how_many_fit_and_why_the_others_do_not(
    auto: Profile,
) -> None:
    there = nodes(
        node("a", gpus=4),
        node("b", cordoned=True),
        node("c", cordoned=True),
        node("d", gpus=2),
        node("other", labels={}),
    )
    (problem,) = check(auto, 3, there, None)
    assert problem.message == (
        "pool gold has room for 1 of 3 workers while nothing else uses its GPUs; "
        "b, c: is cordoned; d: has 2 nvidia.com/gpu and 4 are wanted"
    )


def test_a_node_takes_as_many_workers_as_it_has_gpus_free(auto: Profile) -> None:
    assert check(auto, 2, nodes(node("a", gpus=8)), None) == []
    (problem,) = check(auto, 2, nodes(node("a", gpus=8)), {"a": 1})
    assert problem.message == "pool gold has room for 1 of 2 workers"


def test_nodes_that_are_avoided_do_not_count(auto: Profile) -> None:
    (problem,) = check(auto, 1, nodes(node("a")), None, excluded={"a"})
    assert "a: is avoided because pods failed there" in problem.message


def test_a_pool_that_others_fill_has_no_room(auto: Profile) -> None:
    (problem,) = check(auto, 2, nodes(node("a"), node("b")), {"a": 8, "b": 6})
    assert problem.message == (
        "pool gold has room for 0 of 2 workers; a: has 0 of 8 nvidia.com/gpu free and 4 are "
        "wanted; b: has 2 of 8 nvidia.com/gpu free and 4 are wanted"
    )


def test_a_device_that_no_node_of_the_pool_has_is_told_with_those_that_there_are(
    accepted: Accept,
) -> None:
    limits = {"nvidia.com/gpus": 4, "rdma/hca": 1, "memory": "1Gi", "hugepages-2Mi": "4Mi"}
    profile = accepted({"spec.trainer.resourcesPerNode": {"limits": limits}}, PLATFORM).profile
    there = nodes(node("a"), replace(node("b", labels={}), gpus={"nvidia.com/gpus": 8}))
    (problem,) = placement.unoffered(profile, there)
    assert problem.message == (
        "no node of pool gold offers nvidia.com/gpus, rdma/hca; its nodes offer nvidia.com/gpu"
    )
    (problem,) = placement.unoffered(profile, nodes(node("a", gpus=0)))
    assert problem.message.endswith("; its nodes offer none")
    whole = replace(node("a"), gpus={"nvidia.com/gpus": 8, "rdma/hca": 1})
    assert placement.unoffered(profile, nodes(whole)) == []
    assert placement.unoffered(profile, {}) == [], "that there are no nodes is told already"


def test_of_many_nodes_a_few_are_named(auto: Profile) -> None:
    there = nodes(*(node(f"n{n:02}", ready=False) for n in range(20)))
    (problem,) = check(auto, 1, there, None)
    assert "n07 and 12 more: is not ready" in problem.message


def test_a_node_is_done_without_only_while_enough_are_left(manual: Profile, auto: Profile) -> None:
    named = nodes(node("a", labels=BIG), node("b", labels=BIG))
    assert placement.affordable(manual, 2, named, ["a"]) == ()
    assert placement.affordable(manual, 1, named, ["b", "a"]) == ("b",)
    pool = nodes(*(node(name, gpus=4) for name in "abc"), node("d", gpus=4, ready=False))
    assert placement.affordable(auto, 2, pool, ["a", "b"]) == ("a",)
    assert placement.affordable(auto, 3, pool, ["a"]) == ()
    assert placement.affordable(auto, 3, pool, ["d", "gone"]) == ("d", "gone")


# --- for the scheduler ----------------------------------------------------------------------------


def terms(affinity: dict[str, Any]) -> list[dict[str, Any]]:
    required = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    found: list[dict[str, Any]] = required["nodeSelectorTerms"]
    return found


def name_is(operator: str, name: str) -> dict[str, Any]:
    return {"key": "metadata.name", "operator": operator, "values": [name]}


def test_auto_demands_the_pool_and_its_products(auto: Profile) -> None:
    (term,) = terms(placement.worker_affinity(auto, "1"))
    assert term == {
        "matchExpressions": [
            {"key": POOL, "operator": "In", "values": ["gold"]},
            {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["H100", "H200"]},
        ]
    }


def test_manual_names_each_node_and_lets_one_worker_on_it(manual: Profile) -> None:
    affinity = placement.worker_affinity(manual, "1")
    assert [each["matchFields"] for each in terms(affinity)] == [
        [name_is("In", "a")],
        [name_is("In", "b")],
    ]
    (apart,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["labelSelector"]["matchLabels"] == {
        "training.cptjob.io/job-uid": "1",
        "training.cptjob.io/role": "worker",
    }
    assert placement.node_selector(manual) == {
        POOL: "gold",
        "node.kubernetes.io/instance-type": "big",
    }


def test_a_node_that_failed_is_avoided_softly_and_then_by_demand(auto: Profile) -> None:
    affinity = placement.worker_affinity(auto, "1", soft={"b", "a"}, hard={"c"})
    (term,) = terms(affinity)
    assert term["matchFields"] == [name_is("NotIn", "c")]
    preferred = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [each["preference"]["matchFields"] for each in preferred] == [
        [name_is("NotIn", "a")],
        [name_is("NotIn", "b")],
    ]


def test_of_named_nodes_one_that_failed_is_left_out_but_never_the_last(manual: Profile) -> None:
    one = placement.worker_affinity(manual, "1", hard={"a"})
    assert [each["matchFields"] for each in terms(one)] == [[name_is("In", "b")]]
    none = placement.worker_affinity(manual, "1", hard={"a", "b"})
    assert len(terms(none)) == 2


def test_the_coordinator_prefers_nodes_outside_of_pools_and_never_demands_one(
    auto: Profile,
) -> None:
    affinity = placement.coordinator_affinity(auto)
    assert affinity == {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "preference": {"matchExpressions": [{"key": POOL, "operator": "DoesNotExist"}]},
                }
            ]
        }
    }


def test_a_coordinator_that_shares_a_claim_goes_where_its_worker_may_go(auto: Profile) -> None:
    worker = placement.worker_affinity(auto, "1")
    assert terms(placement.coordinator_affinity(auto, beside=True)) == terms(worker)
    # Where the worker is, labels do not matter any more.
    (term,) = terms(placement.coordinator_affinity(auto, beside=True, node="a"))
    assert term == {"matchFields": [name_is("In", "a")]}


def test_a_worker_prefers_the_node_that_is_near_and_keeps_away_from_those_to_avoid(
    auto: Profile,
) -> None:
    affinity = placement.worker_affinity(auto, "1", near="a", soft={"b"})
    preferred = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [each["preference"]["matchFields"] for each in preferred] == [
        [name_is("In", "a")],
        [name_is("NotIn", "b")],
    ]


def test_a_lost_node_is_tolerated_for_a_short_while_and_no_other_ill(accepted: Accept) -> None:
    settings = parse("pools: {a: {tolerations: [{key: gpu, effect: NoSchedule}]}}")
    found = placement.tolerations(accepted(None, settings).profile)
    assert found[0] == {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert [(each["key"], each["tolerationSeconds"]) for each in found[1:]] == [
        ("node.kubernetes.io/not-ready", 30),
        ("node.kubernetes.io/unreachable", 30),
    ]
