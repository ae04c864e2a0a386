"""A job trains on real nodes, from `helm install` to a model that loads; `.ci/run` has these."""

import json
import re
import subprocess
import sys
from typing import Any

import torch
from team import LONG, Team
from transformers import AutoModelForCausalLM

from helmchart import NAME, NAMESPACE
from testnodes.cluster import Cluster


def test_the_operator_is_ready_as_somebody_other_than_root(
    cluster: Cluster, operator: None
) -> None:
    found = cluster.plane.kubectl("-n", NAMESPACE, "get", "deployment", NAME, "-o", "json")
    assert json.loads(found)["status"]["readyReplicas"] == 2
    user = cluster.plane.kubectl("-n", NAMESPACE, "exec", f"deployment/{NAME}", "--", "id", "-u")
    assert user.strip() == "65532"


def test_two_workers_on_two_nodes_train_one_model(team: Team) -> None:
    # Steps come into the status twice a minute, so it trains for longer than that on an idle machine.
    team.apply("story", {"spec.training.epochs": 7})
    team.wait_for("story", "Running")
    workers = team.living("story")
    assert {pod["spec"]["nodeName"] for pod in workers} == {"node-a", "node-b"}
    team.wait_for_checkpoint("story", 20)
    assert _ranks(team, workers) == {0, 1}

    following = _follow(team, "story")
    rows: list[list[str]] = []

    def moves() -> bool:
        row = _columns(team, "story")
        if row["STEP"].isdigit() and row["CHECKPOINT"].isdigit():
            rows.append([row["STEP"], row["CHECKPOINT"], row["PROGRESS"]])
        return team.status("story")["phase"] == "Complete"

    ranks: dict[str, list[int]] = {}

    def knows_ranks() -> bool:
        ranks.update(
            {each["name"]: each.get("ranks", []) for each in team.status("story")["nodes"]}
        )
        return all(ranks.values())

    team.wait(knows_ranks, "ranks in the status")
    assert sorted(ranks.values()) == [[0], [1]]
    team.wait(moves, "story to be Complete")
    assert len({row[0] for row in rows}) > 1, "kubectl get shows the steps as they go"
    assert _columns(team, "story")["STEP"] == str(team.steps("story")[-1])

    status = team.status("story")
    total = status["resolved"]["totalSteps"]
    assert status["trainerStatus"]["currentStep"] == total
    assert status["trainerStatus"]["progressPercentage"] == 100
    assert team.saved("story") == [total // 20 * 20, total]  # everySteps 20, keepLast 2
    assert status["lastCheckpoint"]["step"] == total
    assert status["lastCheckpoint"]["uri"].startswith("pvc://results/story/checkpoints/step-")
    figures = {each["name"]: float(each["value"]) for each in status["result"]["metrics"]}
    assert figures["heldout_domain_loss_change"] < -1
    _loads(team, "story")
    said, _ = following.communicate(timeout=60)
    lines = [line.partition(" ") for line in said.splitlines()]
    assert {source for source, _, _ in lines} == {"c0", "w0", "w1"}
    assert any(source == "c0" and "prepared" in text for source, _, text in lines)
    assert any(f"step {total} of {total}" in text for _, _, text in lines)


def _follow(team: Team, name: str) -> subprocess.Popen[str]:
    """`cptjob logs --follow`, which ends with the job."""
    place = ["-n", team.namespace, "--kubeconfig", str(team.cluster.plane.kubeconfig)]
    command = [sys.executable, "-m", "cptjob", "logs", name, "--follow", *place]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _ranks(team: Team, workers: list[dict[str, Any]]) -> set[int]:
    """Ranks of the one process group that these pods' processes are in."""
    return {int(rank) for pod in workers for rank in re.findall(r"rank (\d+) of 2", team.log(pod))}


def _columns(team: Team, name: str) -> dict[str, str]:
    """What `kubectl get -o wide` prints, by its heads; cells may be empty."""
    head, line = team.kubectl("get", "cptjob", name, "-o", "wide").splitlines()
    starts = [head.index(word) for word in head.split()]
    ends = [*starts[1:], None]
    return {
        word: line[start:end].strip()
        for word, start, end in zip(head.split(), starts, ends, strict=True)
    }


def _loads(team: Team, name: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(team.output(name) / "model")
    with torch.inference_mode():
        logits = model(torch.arange(8).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()


def test_broken_data_never_holds_a_worker(team: Team) -> None:
    broken = team.volumes["data"] / "domain" / "zz-broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 7}\n')
    team.apply("broken")
    team.wait_for("broken", "Failed")
    failed = team.condition("broken", "Failed")
    assert failed["reason"] == "DataInvalid"
    assert "zz-broken.jsonl" in failed["message"]
    assert "2" in failed["message"].partition("zz-broken.jsonl")[2][:12]
    assert team.pods_ever("broken", "coordinator")
    assert not team.pods_ever("broken", "worker")


def test_a_worker_that_dies_costs_no_more_than_the_steps_since_the_last_checkpoint(
    team: Team,
) -> None:
    team.apply("dies", LONG)
    team.wait_for("dies", "Running")
    saved = team.wait_for_checkpoint("dies", 40)
    victim = team.living("dies")[0]
    team.kubectl("delete", "pod", victim["metadata"]["name"], "--grace-period=0", "--force")
    team.wait_for("dies", "Complete")
    team.check_that_it_went_on("dies", saved)


def test_a_suspended_job_goes_on_from_where_it_was(team: Team) -> None:
    team.apply("rests", LONG)
    team.wait_for("rests", "Running")
    team.wait_for_checkpoint("rests", 20)
    team.kubectl("patch", "cptjob", "rests", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    team.wait_for("rests", "Suspended")
    assert not team.living("rests")
    said = team.condition("rests", "CheckpointReady")
    saved = max(team.saved("rests"))
    assert said["status"] == "True"
    assert str(saved) in said["message"]
    assert team.steps("rests")[-1] == saved  # it saved the step it had come to
    team.kubectl("patch", "cptjob", "rests", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    team.wait_for("rests", "Complete")
    total = team.status("rests")["resolved"]["totalSteps"]
    assert team.steps("rests") == list(range(1, total + 1))


def test_a_job_that_is_applied_again_after_its_end_does_not_train_twice(team: Team) -> None:
    team.apply("again")
    team.wait_for("again", "Complete")
    weights = (team.output("again") / "model" / "model.safetensors").read_bytes()
    before = team.pods_ever("again", "worker")
    team.kubectl("delete", "cptjob", "again")
    team.apply("again")
    team.wait_for("again", "Complete")
    assert team.condition("again", "Complete")["reason"] == "AlreadyComplete"
    assert team.pods_ever("again", "worker") == before
    assert (team.output("again") / "model" / "model.safetensors").read_bytes() == weights
