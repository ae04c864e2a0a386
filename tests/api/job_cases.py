"""Jobs that keep the rules, and one that breaks each: for every judge the tests put them before."""

import copy
from typing import Any

from cptjob_api.fields import Path
from cptjob_api.manifest import as_path

Job = dict[str, Any]


def put(document: Any, path: Path, value: Any) -> None:
    """Set what is at `path`, making mappings on the way."""
    for part in path[:-1]:
        document = document[part] if isinstance(part, int) else document.setdefault(part, {})
    document[path[-1]] = value


def sound_job(changes: dict[str, Any] | None = None) -> Job:
    """A sound job's document with these fields changed: `sound_job({"spec.training.seed": 3})`."""
    document: Job = {
        "apiVersion": "training.cptjob.io/v1alpha1",
        "kind": "CPTJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"storageUri": "pvc://models/tiny"},
            "datasets": [{"name": "domain", "storageUri": "pvc://data/domain"}],
        },
    }
    for place, value in (changes or {}).items():
        put(document, as_path(place), copy.deepcopy(value))
    return document


SOUND: list[dict[str, Any]] = [
    {},
    {"metadata.name": "a" * 40},
    {"spec.task": "TextClassification", "spec.datasets": []},
    {"spec.datasets[0].weight": 0.5},
    {
        "spec.datasets": [
            {"name": "a", "storageUri": "pvc://a", "weight": 1},
            {"name": "b", "storageUri": "s3://bucket/b", "weight": 2.5},
            {"name": "c", "storageUri": "hf://org/c", "role": "General", "weight": 0.5},
            {"name": "d", "storageUri": "pvc://d", "role": "General", "weight": 0.49},
        ]
    },
    {"spec.elasticPolicy": {"minNodes": 1, "maxNodes": 1}},
    {"spec.elasticPolicy": {}, "spec.trainer.numNodes": 500},
    {"spec.scheduling": {"mode": "Manual", "nodeNames": ["a", "b"]}, "spec.trainer.numNodes": 2},
    {"spec.training": {"method": "LoRA", "lora": {"rank": 4}}},
    {"spec.training": {"schedule": {"minLearningRate": 0.1}, "learningRate": 0.2}},
    {"spec.training": {"schedule": {"minLearningRate": 0.1}}},
    {"spec.training.sifting": {"mode": "Unbiased", "betaValue": 0.9}},
]
URI = "write pvc://CLAIM/path, or file:///path in a local run, without '..' in it"
ONCE = "may be named once"
# Changes to a sound job, the field at fault, and how its message begins.
BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"metadata.name": "a" * 41}, "metadata.name", "must be at most 40 characters"),
    ({"metadata.name": "1a"}, "metadata.name", "must be lower-case letters"),
    ({"metadata.name": "a.b"}, "metadata.name", "must be lower-case letters"),
    ({"metadata.name": "a-"}, "metadata.name", "must be lower-case letters"),
    ({"spec.model.storageUri": "models/x"}, "spec.model.storageUri", URI),
    ({"spec.model.storageUri": "pvc://a/../b"}, "spec.model.storageUri", URI),
    ({"spec.datasets[0].storageUri": "s3://B/x"}, "spec.datasets[0].storageUri", URI),
    (
        {"spec.validation.datasets": [{"name": "v", "storageUri": "x"}]},
        "spec.validation.datasets[0].storageUri",
        URI,
    ),
    (
        {"spec.output.storageUri": "hf://a/b"},
        "spec.output.storageUri",
        "hf:// cannot be written; write pvc:",
    ),
    ({"spec.checkpoint.storageUri": "hf://a/b"}, "spec.checkpoint.storageUri", "hf:// cannot"),
    ({"spec.datasets": []}, "spec.datasets", "a CausalLM or MaskedLM job needs"),
    ({"spec.datasets[0].role": "General"}, "spec.datasets", "a CausalLM or MaskedLM job needs"),
    (
        {
            "spec.datasets": [
                {"name": "a", "storageUri": "pvc://a", "weight": 1},
                {"name": "b", "storageUri": "pvc://b"},
            ]
        },
        "spec.datasets",
        "give all Domain data sets a weight",
    ),
    (
        {
            "spec.datasets": [
                {"name": "a", "storageUri": "pvc://a"},
                {"name": "b", "storageUri": "pvc://b", "role": "General", "weight": 0.1},
                {"name": "c", "storageUri": "pvc://c", "role": "General"},
            ]
        },
        "spec.datasets",
        "give all General data sets a weight",
    ),
    (
        {
            "spec.datasets": [
                {"name": "a", "storageUri": "pvc://a"},
                {"name": "b", "storageUri": "pvc://b", "role": "General", "weight": 1},
            ]
        },
        "spec.datasets",
        "weights of General data sets are shares of all tokens",
    ),
    ({"spec.elasticPolicy.minNodes": 2}, "spec.elasticPolicy", "minNodes <= trainer.numNodes"),
    (
        {"spec.elasticPolicy.maxNodes": 2, "spec.trainer.numNodes": 3},
        "spec.elasticPolicy",
        "minNodes <= trainer.numNodes",
    ),
    ({"spec.scheduling.nodeNames": ["a"]}, "spec.scheduling.nodeNames", "nodeNames are for mode"),
    (
        {"spec.scheduling": {"mode": "Manual", "nodeNames": ["a"]}, "spec.trainer.numNodes": 2},
        "spec.scheduling.nodeNames",
        "mode Manual needs a name for each",
    ),
    ({"spec.scheduling.mode": "Manual"}, "spec.scheduling.nodeNames", "mode Manual needs a name"),
    ({"spec.training.lora": {}}, "spec.training.lora", "lora is for method LoRA"),
    (
        {"spec.training": {"schedule": {"minLearningRate": 0.2}, "learningRate": 0.2}},
        "spec.training.schedule.minLearningRate",
        "must be less than learningRate",
    ),
    (
        {
            "spec.datasets": [{"name": "a", "storageUri": "pvc://a"}],
            "spec.validation.datasets": [
                {"name": "b", "storageUri": "pvc://b"},
                {"name": "a", "storageUri": "pvc://c"},
            ],
        },
        "spec.validation.datasets",
        "a held-out data set needs a name that no training data set has",
    ),
    (
        {"spec.trainer.env": [{"name": "NCCL_DEBUG"}, {"name": "RANK", "value": "0"}]},
        "spec.trainer.env",
        "RANK, LOCAL_RANK, GROUP_RANK, WORLD_SIZE,",
    ),
    (
        {"spec.training.sifting": {"mode": "Unbiased", "betaValue": 1}},
        "spec.training.sifting.betaValue",
        "mode Unbiased needs a betaValue below 1",
    ),
]
# What the schema itself says to the API server, by list types.
BY_SCHEMA: list[tuple[dict[str, Any], str, str]] = [
    (
        {"spec.datasets": [{"name": "a", "storageUri": "pvc://a"}] * 2},
        "spec.datasets",
        "names must be unique",
    ),
    (
        {"spec.validation.datasets": [{"name": "a", "storageUri": "pvc://a"}] * 2},
        "spec.validation.datasets",
        "names must be unique",
    ),
    ({"spec.trainer.env": [{"name": "A"}] * 2}, "spec.trainer.env", "names must be unique"),
    ({"spec.scheduling.gpuTypes": ["a", "a"]}, "spec.scheduling.gpuTypes", "each product " + ONCE),
    (
        {"spec.scheduling": {"mode": "Manual", "nodeNames": ["a", "a"]}},
        "spec.scheduling.nodeNames",
        "each node " + ONCE,
    ),
]


# --- changes to an accepted job -------------------------------------------------------------------

# What each field may be changed to, so that a change shows.
OTHER: dict[str, Any] = {
    "task": "MaskedLM",
    "model": {"storageUri": "pvc://other"},
    "datasets": [{"name": "other", "storageUri": "pvc://other"}],
    "data": {"maxBadLines": 1},
    "validation": {"splitPercent": 2},
    "training": {"seed": 1},
    "checkpoint": {"everySteps": 1},
    "output": {"storageUri": "pvc://other"},
    "elasticPolicy": {},
    "scheduling": {"pool": "other"},
    "failurePolicy": {"maxRestarts": 1},
    "hangDetection": {"stepTimeoutSeconds": 1},
    "tracking": {"tensorBoard": True},
    "suspend": True,
    "activeDeadlineSeconds": 1,
    "startupDeadlineSeconds": 1,
    "ttlSecondsAfterFinished": 1,
    "managedBy": "other",
    "trainer.image": "other",
    "trainer.imagePullSecrets": [{"name": "other"}],
    "trainer.numNodes": 2,
    "trainer.numProcPerNode": 2,
    "trainer.resourcesPerNode": {"limits": {"cpu": "1"}},
    "trainer.env": [{"name": "OTHER"}],
    "trainer.secretRefs": [{"name": "other"}],
    "trainer.serviceAccountName": "other",
}
ACCEPTED_STATUS = {"resolved": {"epochs": 3}}
