"""A job trains on real nodes, from `helm install` to a model that loads."""

from helmchart import NAME, NAMESPACE
from testnodes.cluster import Cluster


def test_helm_installs_an_operator_that_is_ready(cluster: Cluster, operator: None) -> None:
    ready = "{.status.readyReplicas}"
    found = cluster.plane.kubectl("-n", NAMESPACE, "get", "deploy", NAME, "-o", f"jsonpath={ready}")
    assert found == "2"


def test_two_pods_on_two_nodes_train_one_model(team) -> None:
    team.submit("tiny")
    team.wait_for("tiny", "Complete")
