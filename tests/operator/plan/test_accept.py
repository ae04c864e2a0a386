"""What is decided for a job, and what is refused: the field by its name, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptjob_api.conditions import Reason
from cptjob_api.facts import ModelFacts
from cptjob_api.job import CPTJob
from cptjob_api.resolve import resolve, trainer_config
from cptjob_operator.plan.accept import CHECKS, Accepted, Refused, accept, too_many_checkpoints
from cptjob_operator.profile import Mount, Profile
from cptjob_operator.settings import Settings, parse
from cptjob_trainer.config import AcceptedConfig, Processes, digest
from cptjob_trainer.model import presets

MakeJob = Callable[..., CPTJob]
Accept = Callable[..., Accepted]

PLATFORM = parse(
    """
    jobs:
      allowedServiceAccounts: [team-trainer]
      imagePullSecrets: [registry]
      priorityClassName: training
    pools:
      gold:
        gpuProducts: [H100, H200]
        extraResources: {rdma/hca: 1}
        env: [{name: NCCL_DEBUG, value: WARN}, {name: NCCL_IB_HCA, value: mlx5}]
        labels: {tier: gold}
        security: {profile: baseline, namespaces: [trusted]}
      amd: {gpuResource: amd.com/gpu}
    limits: {maxNodes: 8, maxCheckpoints: 10}
    """
)
GPUS = {"spec.trainer.resourcesPerNode": {"limits": {"nvidia.com/gpu": 4}}}
# What is changed in a job that would do, the reason, and a part of the message.
REFUSED: list[tuple[dict[str, Any], Reason, str]] = [
    ({"spec.task": "MaskedLM"}, Reason.NOT_SUPPORTED, "spec.task: only CausalLM can be trained"),
    ({"spec.trainer.numNodes": 9}, Reason.LIMIT_EXCEEDED, "spec.trainer.numNodes: 9 nodes are"),
    ({"spec.checkpoint.keepLast": 11}, Reason.LIMIT_EXCEEDED, "keepLast: 11 checkpoints are"),
    ({"spec.scheduling": {}}, Reason.INVALID_SPEC, "pool: name a pool of nodes; there are gold, a"),
    ({"spec.scheduling.pool": "x"}, Reason.INVALID_SPEC, "there is no pool x; pools: gold, amd"),
    (
        {"spec.scheduling.gpuTypes": ["H100", "T4"]},
        Reason.INVALID_SPEC,
        "spec.scheduling.gpuTypes[1]: pool gold has no T4; it has H100, H200",
    ),
    (
        {"spec.trainer.serviceAccountName": "admin"},
        Reason.INVALID_SPEC,
        "admin is not allowed on this platform; use one of default, team-trainer or leave it out",
    ),
    ({"spec.output": {}}, Reason.INVALID_SPEC, "spec.output.storageUri: not given, and this"),
    (
        {"spec.model.storageUri": "file:///models/x"},
        Reason.INVALID_SPEC,
        "spec.model.storageUri: file:// is not to be had on a cluster; put it on a volume",
    ),
    (
        {"spec.datasets[0].storageUri": "pvc://a..b/x"},
        Reason.INVALID_SPEC,
        "spec.datasets[0].storageUri: no volume claim can be named a..b",
    ),
    (
        {"spec.trainer.secretRefs": [{"name": "a"}, {"name": "a.-b"}]},
        Reason.INVALID_SPEC,
        "spec.trainer.secretRefs[1].name: no object can be named a.-b",
    ),
    (
        {"spec.scheduling.mode": "Manual", "spec.scheduling.nodeNames": ["n..1"]},
        Reason.INVALID_SPEC,
        "spec.scheduling.nodeNames[0]: no object can be named n..1",
    ),
    (
        {"metadata.annotations": {"training.cptjob.io/pod-group": "A B"}},
        Reason.INVALID_SPEC,
        "training.cptjob.io/pod-group: no object can be named 'A B'",
    ),
    ({"spec.trainer.image": "a b"}, Reason.INVALID_SPEC, "spec.trainer.image: 'a b' has a space"),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"gpus": 1}}},
        Reason.INVALID_SPEC,
        "spec.trainer.resourcesPerNode.limits.gpus: no resource has this name; write cpu, memory",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"kubernetes.io/x": 1}}},
        Reason.INVALID_SPEC,
        "no resource has this name",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"cpu": "800E1000000"}}},
        Reason.INVALID_SPEC,
        "limits.cpu: 800E1000000",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"cpu": "-1"}}},
        Reason.INVALID_SPEC,
        "limits.cpu: -1 is below 0",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"requests": {"memory": "1e99"}}},
        Reason.INVALID_SPEC,
        "requests.memory: 1e99 is more than can be counted",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"nvidia.com/gpu": "500m"}}},
        Reason.INVALID_SPEC,
        "limits.nvidia.com/gpu: 500m is no whole number",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"cpu": 1}, "requests": {"cpu": "1500m"}}},
        Reason.INVALID_SPEC,
        "resourcesPerNode.requests.cpu: the request (1500m) is more than the limit (1)",
    ),
    (
        {
            "spec.trainer.resourcesPerNode": {
                "limits": {"nvidia.com/gpu": 2},
                "requests": {"nvidia.com/gpu": 1},
            }
        },
        Reason.INVALID_SPEC,
        "the request (1) must equal the limit (2); leave one out",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"nvidia.com/gpu": 4000}}},
        Reason.INVALID_SPEC,
        "a worker with 4000 GPUs is more than 1024 processes can use",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"hugepages-2Mi": "4Mi"}}},
        Reason.INVALID_SPEC,
        "resourcesPerNode: huge pages need a request or limit of cpu or memory beside them",
    ),
    (
        {"spec.trainer.resourcesPerNode": {"limits": {"hugepages-2Mi": "3Mi", "cpu": 1}}},
        Reason.INVALID_SPEC,
        "limits.hugepages-2Mi: 3Mi is no multiple of the page's size",
    ),
    (
        GPUS | {"spec.trainer.numProcPerNode": 8},
        Reason.INVALID_SPEC,
        "spec.trainer.numProcPerNode: 8 processes are more than the 4 GPUs of a worker",
    ),
    (
        {"spec.training.schedule.minLearningRate": 0.1},
        Reason.INVALID_SPEC,
        "spec.training.schedule.minLearningRate: 0.1 is not less than the learning rate",
    ),
    (
        {
            "spec.trainer.env": [{"name": f"A{n}", "value": "é" * 4096} for n in range(64)],
            "spec.datasets": [
                {"name": f"d{n}", "storageUri": f"pvc://d/{'é' * 1000}{n}"} for n in range(64)
            ],
            "spec.validation.datasets": [
                {"name": f"v{n}", "storageUri": f"pvc://d/{'é' * 1000}{n}"} for n in range(64)
            ],
        },
        Reason.INVALID_SPEC,
        "more than a ConfigMap holds; shorten trainer.env",
    ),
]


@pytest.mark.parametrize(("changes", "reason", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_cannot_be_done_is_refused_by_its_name(
    changes: dict[str, Any], reason: Reason, message: str, make_job: MakeJob
) -> None:
    job = make_job({"spec.scheduling.pool": "gold"} | changes)
    answer = accept(job, PLATFORM)
    assert isinstance(answer, Refused)
    assert answer.reason is reason
    assert message in answer.message


def test_each_check_says_what_it_is_for() -> None:
    assert all(check.__doc__ for check in CHECKS)


def test_a_small_job_is_decided_by_the_platforms_defaults(accepted: Accept) -> None:
    answer = accepted()
    assert answer.resolved.pool == "default"
    assert answer.resolved.output_uri == "pvc://results/runs/tiny"
    assert answer.profile.placement.label_value == "default"
    assert answer.profile.security == "restricted"
    assert answer.profile.gpus_per_node == 0
    assert answer.config.paths.output == Path("/volumes/results/runs/tiny")
    assert answer.config.model.path == Path("/volumes/models/tiny")
    assert answer.profile.model_path == "/volumes/models/tiny"


def test_a_claim_that_is_only_read_is_mounted_read_only(accepted: Accept) -> None:
    mounts = accepted(
        {"spec.validation.datasets": [{"name": "v", "storageUri": "pvc://results/v"}]}
    )
    assert mounts.profile.mounts == (
        Mount(claim="data"),
        Mount(claim="models"),
        Mount(claim="results", read_only=False),
    )


def test_the_pool_and_the_platform_are_in_the_profile(accepted: Accept) -> None:
    changes = GPUS | {
        "spec.scheduling": {"pool": "gold", "gpuTypes": ["H200"], "instanceType": "p3.2xlarge"},
        "spec.trainer.imagePullSecrets": [{"name": "mine"}, {"name": "registry"}],
        "spec.trainer.serviceAccountName": "team-trainer",
        "spec.trainer.env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "metadata.labels": {"kueue.x-k8s.io/queue-name": "night", "team": "a"},
        "metadata.annotations": {"scheduling.k8s.io/group-name": "g", "note": "b"},
    }
    profile = accepted(changes, PLATFORM).profile
    assert profile.image_pull_secrets == ("mine", "registry")
    assert profile.service_account_name == "team-trainer"
    assert profile.priority_class_name == "training"
    assert profile.placement.products == ("H200",)
    assert profile.env == {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}
    assert profile.labels == {"tier": "gold", "kueue.x-k8s.io/queue-name": "night"}
    assert profile.annotations == {"scheduling.k8s.io/group-name": "g"}
    assert profile.queue == "night"
    # The manifest's own number goes before that of the instance type.
    assert (profile.gpus_per_node, profile.num_proc_per_node) == (4, 4)
    assert (
        profile.worker.requests == profile.worker.limits == {"nvidia.com/gpu": "4", "rdma/hca": "1"}
    )


def test_an_instance_type_brings_its_gpus(accepted: Accept) -> None:
    scheduling = {"pool": "gold", "instanceType": "p3.8xlarge"}
    profile = accepted({"spec.scheduling": scheduling}, PLATFORM).profile
    assert (profile.gpus_per_node, profile.num_proc_per_node) == (4, 4)
    assert profile.worker.limits["nvidia.com/gpu"] == "4"


def test_a_pool_has_its_own_kind_of_gpu(accepted: Accept) -> None:
    changes = {
        "spec.scheduling.pool": "amd",
        "spec.trainer.resourcesPerNode": {"requests": {"amd.com/gpu": 2, "cpu": 3}},
    }
    profile = accepted(changes, PLATFORM).profile
    assert (profile.gpu_resource, profile.gpus_per_node, profile.num_proc_per_node) == (
        "amd.com/gpu",
        2,
        2,
    )
    # The API server wants a limit for a device, and none for a core.
    assert profile.worker.limits == {"amd.com/gpu": "2"}


@pytest.mark.parametrize(
    ("namespace", "security"), [("trusted", "baseline"), ("team", "restricted")]
)
def test_a_looser_standard_is_for_the_namespaces_that_are_listed(
    namespace: str, security: str, make_job: MakeJob
) -> None:
    job = make_job({"spec.scheduling.pool": "gold"})
    job = job.model_copy(
        update={"metadata": job.metadata.model_copy(update={"namespace": namespace})}
    )
    answer = accept(job, PLATFORM)
    assert isinstance(answer, Accepted)
    assert answer.profile.security == security


def test_what_was_frozen_is_read_back_as_it_was(accepted: Accept) -> None:
    answer = accepted(GPUS | {"spec.scheduling.pool": "gold"}, PLATFORM)
    assert Profile.from_json(answer.profile.model_dump_json()) == answer.profile
    assert AcceptedConfig.from_json(answer.config.model_dump_json()) == answer.config


def test_a_profile_of_a_newer_operator_can_be_read(accepted: Accept) -> None:
    text = accepted().profile.model_dump_json()
    newer = text.replace('{"version":1', '{"version":1,"news":{"a":1}', 1)
    assert newer != text
    assert Profile.from_json(newer) == accepted().profile


@pytest.mark.parametrize("positions", [None, 512])
def test_a_cluster_makes_what_a_local_run_of_the_same_manifest_makes(
    positions: int | None, make_job: MakeJob, accepted: Accept
) -> None:
    changes = {"spec.trainer": {"numNodes": 3, "numProcPerNode": 2}}
    on_cluster = presets.complete(accepted(changes).config, positions)
    job = make_job(changes)
    local = trainer_config(
        job,
        resolve(job, ModelFacts(max_positions=positions)),
        uid="other",
        output=Path("/out"),
        locate=lambda uri: Path("/here", uri),
        processes=Processes(num_nodes=1, num_proc_per_node=1),
    )
    assert digest(on_cluster, "model", "data") == digest(local, "model", "data")


@pytest.mark.parametrize(
    ("checkpoint", "steps", "fault"),
    [
        ({"keepLast": 10}, 10_000, None),
        ({"everySteps": 10}, None, None),
        ({"everySteps": 10}, 100, None),
        ({"everySteps": 10}, 101, "a checkpoint every 10 of 101 steps makes 11"),
        ({"everySteps": 10, "keepLast": 2}, 101, None),
    ],
)
def test_a_job_that_keeps_all_is_held_to_the_limit_once_its_steps_are_known(
    checkpoint: dict[str, int], steps: int | None, fault: str | None, make_job: MakeJob
) -> None:
    job = make_job({"spec.checkpoint": checkpoint})
    said = too_many_checkpoints(job.spec.checkpoint, steps, PLATFORM)
    assert said is None if fault is None else fault in (said or "")


def test_a_job_of_the_platforms_default_pool_and_output_needs_to_name_neither(
    make_job: MakeJob,
) -> None:
    settings = parse("{jobs: {pool: b, outputUri: pvc://all}, pools: {a: {}, b: {}}}")
    answer = accept(make_job({"spec.output": {}}), settings)
    assert isinstance(answer, Accepted)
    assert (answer.resolved.pool, answer.resolved.output_uri) == ("b", "pvc://all/tiny")


def test_default_settings_take_a_sound_job(make_job: MakeJob) -> None:
    assert isinstance(accept(make_job(), Settings()), Accepted)
