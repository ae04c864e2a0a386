"""Pods and the other objects of a job, whole: golden/CASE.yaml holds what is made for each case.

`python tests/operator/objects/test_pods.py` writes the golden files anew.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from any_job import jobs
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from cptjob_api.job import CPTJob
from cptjob_api.kubeyaml import dump
from cptjob_operator.identity import OURS, PodId, Role
from cptjob_operator.objects import children, pods, tensorboard
from cptjob_operator.plan.accept import Accepted, Refused, accept
from cptjob_operator.profile import Profile
from cptjob_operator.settings import Network, Settings, parse
from cptjob_trainer.config import AcceptedConfig
from job_cases import sound_job

Accept = Callable[..., Accepted]
MakeJob = Callable[..., CPTJob]
Manifest = dict[str, Any]

GOLDEN = Path(__file__).parent / "golden"
UID = "3f0c8a52-7d1e-4a57-9d0a-6c1d2b3e4f50"
GPU = "nvidia.com/gpu"

PLATFORM = """
jobs: {image: "registry.example/trainer:1", imagePullSecrets: [registry]}
pools:
  gold:
    gpuProducts: [NVIDIA-H100-80GB-HBM3]
    tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]
    labels: {tier: gold}
    annotations: {k8s.v1.cni.cncf.io/networks: rdma}
    runtimeClassName: nvidia
    extraResources: {rdma/hca: 8}
    env: [{name: NCCL_IB_HCA, value: mlx5}]
    shmSize: 64Gi
    runAsUser: 1000
    fsGroup: 1000
  open:
    nodeSelector: {zone: a}
    fsGroup: null
    security: {profile: baseline, namespaces: [team]}
"""
# One for each way that pods can look; the rest of the job is small.
CASES: dict[str, Manifest] = {
    "one-node": {"spec.scheduling.pool": "open"},
    "gpus": {
        "spec.scheduling.pool": "gold",
        "spec.tracking.tensorBoard": True,
        "spec.trainer": {
            "numNodes": 4,
            "resourcesPerNode": {"limits": {GPU: 8, "memory": "900Gi"}, "requests": {"cpu": 90}},
            "secretRefs": [{"name": "hub"}],
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        },
    },
    "manual": {
        "spec.scheduling": {
            "pool": "gold",
            "mode": "Manual",
            "nodeNames": ["gpu-1", "gpu-2", "gpu-3"],
            "priorityClassName": "urgent",
            "schedulerName": "volcano",
        },
        "spec.trainer.numNodes": 2,
        "metadata.annotations": {"scheduling.k8s.io/group-name": "gang"},
    },
    "queue": {
        "spec.scheduling.pool": "gold",
        "spec.trainer": {"numNodes": 3, "resourcesPerNode": {"limits": {GPU: 1}}},
        "metadata.labels": {
            "kueue.x-k8s.io/queue-name": "night",
            "kueue.x-k8s.io/priority-class": "low",
        },
        "metadata.annotations": {"training.cptjob.io/pod-group": "gang"},
    },
}


def identity(role: Role = Role.WORKER, index: int = 0, attempt: int = 0) -> PodId:
    return PodId(UID, attempt, role, index, 0)


def rendered(case: str) -> list[Manifest]:
    """Everything that a job of this case gets: one worker speaks for all."""
    document = sound_job({"spec.output.storageUri": "pvc://results/runs"} | CASES[case])
    document["metadata"] |= {"namespace": "team", "uid": UID}
    job = CPTJob.from_json(json.dumps(document))
    settings = parse(PLATFORM)
    answer = accept(job, settings)
    assert isinstance(answer, Accepted), answer
    profile = answer.profile
    return [
        *children.missing(job, profile, answer.config, settings.network, {}),
        *tensorboard.missing(job, profile, {}),
        pods.coordinator(job, profile, identity(Role.COORDINATOR), beside=case == "one-node"),
        pods.worker(job, profile, identity(index=1, attempt=2), {"gpu-1"}, {"gpu-2"}),
    ]


def text_of(case: str) -> str:
    return "---\n".join(dump(_opened(each)) for each in rendered(case))


def _opened(manifest: Manifest) -> Manifest:
    """The manifest with files of a ConfigMap as values, so that a change shows where it is."""
    if "data" not in manifest:
        return manifest
    return manifest | {"data": {name: json.loads(text) for name, text in manifest["data"].items()}}


@pytest.mark.parametrize("case", CASES)
def test_what_is_made_is_what_the_golden_file_says(case: str) -> None:
    assert text_of(case) == (GOLDEN / f"{case}.yaml").read_text(encoding="utf-8")


def test_each_golden_file_has_its_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.yaml")} == set(CASES)


# --- one promise each -----------------------------------------------------------------------------


def worker_of(accepted: Accept, make_job: MakeJob, changes: Manifest | None = None) -> Manifest:
    return pods.worker(make_job(changes), accepted(changes).profile, identity())


def test_the_same_pod_twice_is_equal_and_shares_nothing(
    accepted: Accept, make_job: MakeJob
) -> None:
    job, profile = make_job(), accepted().profile
    first = pods.worker(job, profile, identity())
    again = pods.worker(job, profile, identity())
    assert first == again
    first["spec"]["containers"][0]["resources"]["x"] = 1
    first["metadata"]["labels"]["x"] = "1"
    assert pods.worker(job, profile, identity()) == again


def test_a_job_that_grew_has_workers_that_know_it(accepted: Accept, make_job: MakeJob) -> None:
    profile = accepted({"spec.trainer.numNodes": 2}).profile
    grown = make_job({"spec.trainer.numNodes": 5})
    command = pods.worker(grown, profile, identity())["spec"]["containers"][0]["command"]
    assert command[command.index("--nnodes") + 1] == "5"


def test_each_attempt_meets_under_a_name_of_its_own(accepted: Accept, make_job: MakeJob) -> None:
    job, profile = make_job(), accepted().profile
    runs = set()
    for attempt in range(3):
        pod = pods.worker(job, profile, identity(attempt=attempt))
        command = pod["spec"]["containers"][0]["command"]
        runs.add(command[command.index("--run-id") + 1])
    assert runs == {f"{UID}.0", f"{UID}.1", f"{UID}.2"}


def test_secrets_go_into_pods_by_name_only(accepted: Accept, make_job: MakeJob) -> None:
    changes = {
        "spec.trainer.secretRefs": [{"name": "hub"}],
        "spec.trainer.imagePullSecrets": [{"name": "registry"}],
    }
    spec = worker_of(accepted, make_job, changes)["spec"]
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert not any("secret" in each for each in spec["volumes"])


def test_only_what_schedulers_read_is_passed_on(accepted: Accept, make_job: MakeJob) -> None:
    changes = {
        "metadata.labels": {
            "team": "a",
            "scheduling.x-k8s.io/pod-group": "g",
            "training.cptjob.io/role": "coordinator",
            "app.kubernetes.io/managed-by": "helm",
        }
    }
    labels = worker_of(accepted, make_job, changes)["metadata"]["labels"]
    assert "team" not in labels
    assert labels["scheduling.x-k8s.io/pod-group"] == "g"
    assert labels["training.cptjob.io/role"] == "worker"
    assert labels["app.kubernetes.io/managed-by"] == "cptjob-operator"


def test_a_label_of_the_job_cannot_make_a_pod_another_ones(
    accepted: Accept, make_job: MakeJob
) -> None:
    changes = {
        "metadata.labels": {
            "kueue.x-k8s.io/pod-group-name": "other",
            "kueue.x-k8s.io/queue-name": "q",
        }
    }
    labels = worker_of(accepted, make_job, changes)["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/pod-group-name"] == "tiny-3f0c8-0"


def test_the_coordinator_is_in_no_queue_and_asks_for_no_gpu(
    accepted: Accept, make_job: MakeJob
) -> None:
    changes = {
        "metadata.labels": {"kueue.x-k8s.io/queue-name": "q"},
        "spec.trainer.resourcesPerNode": {"limits": {GPU: 8}},
    }
    answer = accepted(changes)
    pod = pods.coordinator(make_job(changes), answer.profile, identity(Role.COORDINATOR))
    assert not any("kueue" in key for key in pod["metadata"]["labels"])
    assert GPU not in json.dumps(pod)


def test_a_child_says_when_it_is_missing_or_differs(accepted: Accept, make_job: MakeJob) -> None:
    job, answer, network = make_job(), accepted(), Network()
    every = children.missing(job, answer.profile, answer.config, network, {})
    there = {each["kind"]: children.hash_of(each) for each in every}

    def missing(there: dict[str, str], network: Network = network) -> list[str]:
        found = children.missing(job, answer.profile, answer.config, network, there)
        return [each["kind"] for each in found]

    assert missing({}) == ["ConfigMap", "Service", "NetworkPolicy"]
    assert missing(there) == []
    assert missing(there | {"Service": "other"}) == ["Service"]
    assert missing(there | {"ConfigMap": "of an older operator"}) == []
    assert missing(there, Network(operator_namespace="elsewhere")) == ["NetworkPolicy"]


SHOWN = {"spec.tracking.tensorBoard": True}


def test_tensorboard_is_there_for_jobs_that_ask_for_it(accepted: Accept, make_job: MakeJob) -> None:
    assert tensorboard.missing(make_job(), accepted().profile, {}) == ()
    every = tensorboard.missing(make_job(SHOWN), accepted(SHOWN).profile, {})
    assert [each["kind"] for each in every] == ["Service", "NetworkPolicy", "Deployment"]
    there = {each["kind"]: children.hash_of(each) for each in every}
    assert tensorboard.missing(make_job(SHOWN), accepted(SHOWN).profile, there) == ()
    older = accepted(SHOWN).profile.model_dump_json(exclude={"log_dir"})
    assert tensorboard.missing(make_job(SHOWN), Profile.from_json(older), {}) == ()


def test_nothing_takes_tensorboard_for_a_pod_of_the_job(
    accepted: Accept, make_job: MakeJob
) -> None:
    job, answer = make_job(SHOWN), accepted(SHOWN)
    pod = tensorboard.deployment(job, answer.profile, "/x")["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    selectors = [
        children.network_policy(job, Network())["spec"]["podSelector"]["matchLabels"],
        children.service(job)["spec"]["selector"],
        dict([OURS.split("=")]),
    ]
    assert not any(each.items() & labels for each in selectors)
    for each in tensorboard.missing(job, answer.profile, {})[:2]:
        selected = each["spec"].get("selector") or each["spec"]["podSelector"]["matchLabels"]
        assert selected.items() <= labels


def test_tensorboard_can_do_nothing_but_read_the_output(
    accepted: Accept, make_job: MakeJob
) -> None:
    changes = SHOWN | {
        "spec.trainer": {
            "resourcesPerNode": {"limits": {GPU: 8}},
            "secretRefs": [{"name": "hub"}],
            "env": [{"name": "TOKEN", "value": "x"}],
        }
    }
    job, profile = make_job(changes), accepted(changes).profile
    (made,) = [each for each in tensorboard.missing(job, profile, {}) if "replicas" in each["spec"]]
    spec = made["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    mounts = {each["mountPath"]: each.get("readOnly") for each in container["volumeMounts"]}
    assert mounts == {"/tmp": None, "/volumes/results": True}
    text = json.dumps(made)
    assert not any(word in text for word in (GPU, "hub", "TOKEN", "/volumes/models"))
    assert spec["automountServiceAccountToken"] is False
    assert container["command"][4] == "/volumes/results/runs/tiny/tensorboard"


def test_the_config_map_holds_what_pods_and_operators_read_back(
    accepted: Accept, make_job: MakeJob
) -> None:
    answer = accepted()
    made = children.config_map(make_job(), answer.profile, answer.config)
    assert made["immutable"] is True
    assert Profile.from_json(made["data"]["profile.json"]) == answer.profile
    assert AcceptedConfig.from_json(made["data"]["config.json"]) == answer.config


# --- any job --------------------------------------------------------------------------------------

_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
MANY = hypothesis_settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@MANY
@given(jobs())
def test_any_job_is_accepted_or_refused_in_words_and_its_objects_have_sound_names(
    job: CPTJob,
) -> None:
    answer = accept(job, Settings())
    if isinstance(answer, Refused):
        assert answer.message.startswith(("spec.", "spec:", "metadata."))
        return
    last = job.spec.trainer.num_nodes - 1
    made = [
        *children.missing(job, answer.profile, answer.config, Network(), {}),
        *tensorboard.missing(job, answer.profile, {}),
        pods.coordinator(job, answer.profile, PodId(UID, 0, Role.COORDINATOR, 0, 99)),
        pods.worker(job, answer.profile, PodId(UID, 999, Role.WORKER, last, 99), {"a"}, {"b"}),
    ]
    for each in made:
        json.dumps(each)
        assert yaml.safe_load(dump(each)) is not None
        name = each["metadata"]["name"]
        assert _DNS.fullmatch(name)
        assert len(name) <= 63
        for value in each["metadata"]["labels"].values():
            assert _LABEL.fullmatch(value)
            assert len(value) <= 63
    for pod in made[-2:]:
        volumes = [each["name"] for each in pod["spec"]["volumes"]]
        mounts = [each["mountPath"] for each in pod["spec"]["containers"][0]["volumeMounts"]]
        variables = [each["name"] for each in pod["spec"]["containers"][0]["env"]]
        for names in (volumes, mounts, variables):
            assert len(names) == len(set(names))
        assert all(_DNS.fullmatch(volume) for volume in volumes)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.yaml").write_text(text_of(case), encoding="utf-8")


if __name__ == "__main__":
    main()
