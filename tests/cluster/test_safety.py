"""What a job cannot do: leave its namespace, get more than pods may, tell secrets, take over."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client import ApiException
from running import RunningOperator
from world import OURS, World

from cptjob_api.rules import MUTABLE, TRANSITIONS
from job_cases import OTHER
from testplane.plane import ControlPlane

ENFORCE = "pod-security.kubernetes.io/enforce"
BASELINE = "baseline-pods"  # the one namespace whose jobs may have less strict pods
SETTINGS = {
    "pools": {
        "default": {},
        "loose": {"security": {"profile": "baseline", "namespaces": [BASELINE]}},
    },
    "jobs": {
        "image": "test.invalid/trainer:1",
        "pool": "default",
        "allowedServiceAccounts": ["trainer"],
    },
}
Object = dict[str, Any]
Changes = dict[str, Any]

pytestmark = pytest.mark.usefixtures("operator")


def as_document(world: World, pod: Any) -> Object:
    found: Object = world.core.api_client.sanitize_for_serialization(pod)
    return found


def all_pods(world: World) -> list[Object]:
    return [
        as_document(world, each) for role in ("coordinator", "worker") for each in world.pods(role)
    ]


def make(world: World, changes: Changes | None = None, workers: int = 1) -> list[Object]:
    """The pods of a job that has them all."""
    world.create("job", workers, changes)
    world.prepare("job")
    world.wait(lambda: len(world.pods()) == workers, "the workers")
    return all_pods(world)


# --- pods ---


@pytest.fixture(name="enforce")
def make_enforce(world: World) -> None:
    """The namespace admits only pods of the standard `restricted`."""
    labels = {ENFORCE: "restricted", f"{ENFORCE}-version": "latest"}
    world.core.patch_namespace(world.namespace, {"metadata": {"labels": labels}})
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}

    def refused() -> bool:
        try:
            world.core.create_namespaced_pod(world.namespace, pod, dry_run="All")
        except ApiException as error:
            return "violates PodSecurity" in error.body
        return False

    world.wait(refused, "the standard to be enforced")


@pytest.mark.parametrize("name", ["default", "loose"])
def test_a_job_runs_where_only_restricted_pods_are_admitted(
    world: World, enforce: None, name: str
) -> None:
    limits = {"nvidia.com/gpu": "8", "memory": "9Gi"}
    changes = {
        "spec.scheduling": {"pool": name},
        "spec.trainer": {
            "numNodes": 2,
            "resourcesPerNode": {"limits": limits},
            "secretRefs": [{"name": "hub"}],
            "env": [{"name": "A", "value": "1"}],
        },
    }
    world.create("job", changes=changes)
    world.prepare("job")
    world.run("job", 2)


def test_only_the_named_namespaces_get_pods_of_a_looser_standard(
    plane: ControlPlane, api: client.ApiClient, world: World
) -> None:
    core = client.CoreV1Api(api)
    core.create_namespace({"metadata": {"name": BASELINE}})
    account = f"/api/v1/namespaces/{BASELINE}/serviceaccounts/default"
    plane.wait(lambda: plane.get(account)[0] == 200, "the default service account")
    loose = World(plane, api, BASELINE)
    contexts = []
    for each in (loose, world):
        each.create("job", changes={"spec.scheduling": {"pool": "loose"}})
        each.wait(lambda each=each: each.pods("coordinator"), "the coordinator")
        pod = all_pods(each)[0]
        contexts.append(pod["spec"]["containers"][0]["securityContext"])
    core.delete_namespace(BASELINE)
    assert "capabilities" not in contexts[0]
    assert contexts[1]["capabilities"] == {"drop": ["ALL"]}


def sources(pod: Object) -> set[str]:
    """Kinds of volumes."""
    return {kind for volume in pod["spec"]["volumes"] for kind in volume if kind != "name"}


def test_pods_have_nothing_of_the_host_and_no_token(world: World) -> None:
    # What the schema does not know is dropped before it is kept.
    host = {"volumes": [{"name": "host", "hostPath": {"path": "/"}}], "hostNetwork": True}
    for pod in make(world, {"spec.trainer.podSpec": host, "spec.volumes": host["volumes"]}):
        spec = pod["spec"]
        assert sources(pod) == {"configMap", "emptyDir", "persistentVolumeClaim"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "default"
        (container,) = spec["containers"]
        assert "privileged" not in container["securityContext"]
    assert "podSpec" not in world.job("job")["spec"]["trainer"]


SECRET = {"name": "other-team/secret"}
ESCAPES: list[Changes] = [
    {"spec.output.storageUri": "pvc://results/../../other"},
    {"spec.output.storageUri": "pvc://../other"},
    {"spec.output.storageUri": "pvc://other/.."},
    {"spec.output.storageUri": "file:///var/lib/kubelet"},
    {"spec.output.storageUri": "hostPath:///etc"},
    {"spec.model.storageUri": "pvc://kube-system%2fsecrets/x"},
    {"spec.model.storageUri": "pvc://models.kube-system.svc:80/x"},
    {"spec.model.storageUri": "pvc://models\n/x"},
    {"spec.model.storageUri": "pvc:///etc"},
    {"spec.datasets[0].storageUri": "pvc://data/a/../../../etc"},
    {"spec.datasets[0].storageUri": "file:///etc/passwd"},
    {"spec.datasets[0].storageUri": "pvc://a..b/x"},
    {"spec.datasets[0].name": "../../etc"},
    {"spec.trainer.secretRefs": [SECRET]},
    {"spec.trainer.secretRefs": [{"name": "..", "namespace": "other"}]},
    {"spec.trainer.secretRefs": [{"name": "a..b"}]},
    {"spec.trainer.imagePullSecrets": [SECRET]},
    {"spec.trainer.serviceAccountName": "kube-system/admin"},
    {"spec.trainer.serviceAccountName": "admin"},
    {"spec.trainer.env": [{"name": "A=B", "value": "c"}]},
    {"spec.trainer.env": [{"name": "A\nB", "value": "c"}]},
    {"spec.scheduling": {"pool": "../default"}},
    {"spec.scheduling": {"pool": "unknown"}},
    {"spec.scheduling": {"mode": "Manual", "nodeNames": ["a/../b"]}},
    {"spec.scheduling": {"priorityClassName": "a/b"}},
    {"metadata.name": "a/../b"},
    {"metadata.name": "..", "metadata.generateName": "x"},
]


@pytest.mark.parametrize("changes", ESCAPES, ids=json.dumps)
def test_no_name_and_no_address_leads_out(world: World, changes: Changes) -> None:
    try:
        name = world.create("job", changes=changes)["metadata"]["name"]
    except ApiException as error:
        if error.status not in (400, 404, 422):
            raise
        return
    world.wait(lambda: world.condition(name, "Stalled"), "it to be refused")
    field = next(iter(changes)).removesuffix("[0].storageUri")
    assert field in world.condition(name, "Stalled")["message"]
    assert all_pods(world) == []
    assert world.children() == []


def test_a_service_account_must_be_allowed_by_the_platform(world: World) -> None:
    world.create("other", changes={"spec.trainer.serviceAccountName": "builder"})
    world.wait(lambda: world.condition("other", "Stalled"), "it to be refused")
    assert world.condition("other", "Stalled")["message"] == (
        "spec.trainer.serviceAccountName: builder is not allowed on this platform; use one of "
        "default, trainer or leave it out; edit the job, or the platform its settings, and it goes "
        "on"
    )
    account = {"metadata": {"name": "trainer"}}
    world.core.create_namespaced_service_account(world.namespace, account)
    pods = make(world, {"spec.trainer.serviceAccountName": "trainer"})
    assert {pod["spec"]["serviceAccountName"] for pod in pods} == {"trainer"}
    assert world.pods(job="other") == []


HOSTILE = "$(HOME)\"'`; touch /tmp/x\n- name: x\n  hostPath: {path: /}\n#{{ .Values }} %s {0} é\\"


def test_values_of_the_environment_stay_values(world: World) -> None:
    def pods(name: str) -> list[tuple[str, list[Object]]]:
        """The specs, without what every job has for itself, and their environments."""
        own = f"{name}-{world.job(name)['metadata']['uid'][:5]}"
        found = []
        for role in ("coordinator", "worker"):
            (pod,) = world.pods(role, name)
            spec = as_document(world, pod)["spec"]
            spec.pop("nodeName", None)
            environment = spec["containers"][0].pop("env")
            text = json.dumps(spec, sort_keys=True).replace(own, "OWN")
            found.append((text.replace(pod.metadata.owner_references[0].uid, "UID"), environment))
        return found

    env = [{"name": "A", "value": HOSTILE}, {"name": "LD_PRELOAD", "value": "/volumes/x.so"}]
    world.create("plain")
    world.create("hostile", changes={"spec.trainer.env": env})
    world.prepare("plain", "hostile")
    world.wait(lambda: len(world.pods()) == 2, "the workers")
    for (plain, least), (hostile, given) in zip(pods("plain"), pods("hostile"), strict=True):
        assert hostile == plain
        assert given == least + env


def test_labels_and_annotations_of_a_job_do_not_make_its_pods_those_of_another(
    world: World,
) -> None:
    victim = world.create("victim")["metadata"]["uid"]
    forged = {
        "training.cptjob.io/job-uid": victim,
        "training.cptjob.io/job-name": "victim",
        "training.cptjob.io/role": "coordinator",
        "app.kubernetes.io/managed-by": "somebody",
        "app.kubernetes.io/name": "cptjob-operator",
        "kueue.x-k8s.io/queue-name": "night",
    }
    annotations = {"training.cptjob.io/hash": "x", "seccomp.security.alpha.kubernetes.io/pod": "x"}
    world.create("job", changes={"metadata.labels": forged, "metadata.annotations": annotations})
    world.prepare("victim", "job")
    world.wait(lambda: len(world.pods()) == 2, "the workers")
    uid = world.job("job")["metadata"]["uid"]
    (worker,) = (as_document(world, each) for each in world.pods(job="job"))
    own = worker["metadata"]["labels"]
    assert own["training.cptjob.io/job-uid"] == uid
    assert own["training.cptjob.io/role"] == "worker"
    assert own["app.kubernetes.io/managed-by"] == "cptjob-operator"
    assert "app.kubernetes.io/name" not in own
    assert own["kueue.x-k8s.io/queue-name"] == "night", "what queues need is passed on"
    assert not annotations.keys() & worker["metadata"].get("annotations", {}).keys()
    for child in world.children():
        if child.metadata.name.startswith("job-"):
            assert child.metadata.labels["training.cptjob.io/job-uid"] == uid


# --- secrets ---

CANARY = "canary-7f3a9d"


def everything(world: World) -> dict[str, str]:
    """All objects of the namespace, Events too, as JSON by their name."""
    kinds = world.plane.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name")
    text = world.plane.kubectl("get", ",".join(kinds.split()), "-o=json", "-n", world.namespace)
    return {
        f"{each['kind']}/{each['metadata']['name']}": json.dumps(each)
        for each in json.loads(text)["items"]
    }


def test_no_secret_is_told_anywhere(world: World, operator: RunningOperator) -> None:
    data = {name: base64.b64encode(CANARY.encode()).decode() for name in ("TOKEN", "password")}
    docker = json.dumps({"auths": {"test.invalid": {"auth": CANARY}}})
    pull = {".dockerconfigjson": base64.b64encode(docker.encode()).decode()}
    for name, kind, content in (
        ("hub", "Opaque", data),
        ("registry", "kubernetes.io/dockerconfigjson", pull),
    ):
        secret = {"metadata": {"name": name}, "type": kind, "data": content}
        world.core.create_namespaced_secret(world.namespace, secret)
    secrets = {
        "spec.trainer.secretRefs": [{"name": "hub"}],
        "spec.trainer.imagePullSecrets": [{"name": "registry"}],
    }
    make(world, secrets)
    world.run("job", 1)
    (worker,) = world.living("job")
    world.kubelet.exit(world.namespace, worker.metadata.name, 1, "boom")
    world.wait(lambda: world.told("job", "Restarting", "boom"), "the failure to be told")
    world.run("job", 1)
    world.suspend("job")
    world.suspend("job", on=False)
    world.prepare("job")
    world.run("job", 1)
    world.complete("job")
    world.wait(lambda: world.told("job", "Complete"), "the end to be told")
    canaries = (CANARY, data["TOKEN"], pull[".dockerconfigjson"])
    objects = everything(world)
    found = {name for name, text in objects.items() if any(each in text for each in canaries)}
    assert found == {"Secret/hub", "Secret/registry"}, "the search finds them, and nothing else"
    assert {name.split("/")[0] for name in objects} >= {"CPTJob", "ConfigMap", "Pod", "Event"}
    log = operator.log.read_text("utf-8") + operator.get("metrics", operator.metrics_port)[1]
    assert world.namespace in log
    assert not any(each in log for each in canaries)
    (worker,) = world.pods()[-1:]
    assert worker.spec.containers[0].env_from[0].secret_ref.name == "hub"
    assert worker.spec.image_pull_secrets[0].name == "registry"


# --- what belongs to others ---


THEIRS: dict[str, Object] = {
    "ConfigMap": {"apiVersion": "v1", "data": {"profile.json": "{}"}},
    "NetworkPolicy": {
        "apiVersion": "networking.k8s.io/v1",
        "spec": {"podSelector": {"matchLabels": {"app": "theirs"}}},
    },
}


def test_objects_of_somebody_with_a_jobs_name_are_not_touched_and_hold_it_up(
    world: World, operator: RunningOperator
) -> None:
    names: dict[str, str] = {}
    operator.freeze()  # the names hold the jobs' uids, which nobody knows before
    try:
        for kind, content in THEIRS.items():
            job = world.create(kind.lower())["metadata"]
            names[kind] = f"{job['name']}-{job['uid'][:5]}"
            theirs = {"kind": kind, "metadata": {"name": names[kind]}} | content
            text = json.dumps(theirs)
            world.plane.kubectl("create", "-n", world.namespace, "-f", "-", stdin=text)
    finally:
        operator.thaw()

    def get(kind: str) -> Object:
        arguments = ("get", kind, names[kind], "-o", "json", "-n", world.namespace)
        return dict(json.loads(world.plane.kubectl(*arguments)))

    before = {kind: get(kind) for kind in names}
    for kind, name in names.items():
        told = f"there is a {kind} {name} that does not belong to this job; delete or rename it"
        world.wait(lambda kind=kind, told=told: world.says(kind.lower(), "Refused", told), told)
    operator.wait_quiet()
    assert {kind: get(kind) for kind in names} == before
    assert all_pods(world) == [], "none with a configuration or a fence of somebody else"
    for kind, name in names.items():
        world.plane.kubectl("delete", kind, name, "-n", world.namespace)
    world.prepare(*(kind.lower() for kind in names))
    assert len(world.children()) == 6


@contextmanager
def kept(world: World, namespace: str, *kinds: str) -> Iterator[None]:
    """Lets go, in the end, of what a finalizer keeps there."""
    try:
        yield
    finally:
        for kind in kinds:
            patch = '-p={"metadata":{"finalizers":null}}'
            names = world.plane.kubectl("get", kind, "-n", namespace, "-o", "name", f"-l={OURS}")
            for name in names.split():
                world.plane.kubectl("patch", name, "-n", namespace, "--type=merge", patch)


def forge(world: World, kind: str, name: str, namespace: str, more: Object) -> None:
    """A copy of an object in another namespace, owner reference and all, with some changes."""
    text = world.plane.kubectl("get", kind, name, "-o", "json", "-n", world.namespace)
    found = json.loads(text)
    about = {key: found["metadata"][key] for key in ("name", "labels", "ownerReferences")}
    # Else the garbage collector, which looks for the owner in that namespace, might be first.
    about |= {"finalizers": ["testplane/keep"], "annotations": found["metadata"].get("annotations")}
    forged = {key: found[key] for key in ("apiVersion", "kind", "spec", "data") if key in found}
    forged |= {"metadata": about} | more
    world.plane.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(forged))


def test_what_another_namespace_makes_up_is_not_taken_for_the_jobs(
    world: World, operator: RunningOperator, new_namespace: Callable[[], str]
) -> None:
    namespace = new_namespace()
    while namespace < world.namespace:  # lists are sorted, and the last word counts
        namespace = new_namespace()
    world.create("job")
    world.wait(lambda: world.pods("coordinator"), "the coordinator")
    (coordinator,) = world.pods("coordinator")
    (config,) = world.core.list_namespaced_config_map(world.namespace, label_selector=OURS).items
    profile = json.loads(config.data["profile.json"]) | {"image": "evil"}
    forged = {"data": config.data | {"profile.json": json.dumps(profile)}}
    said = json.dumps({"exitCode": 0, "reason": "Complete", "message": "{}"})
    with kept(world, namespace, "pods", "configmaps"):
        forge(world, "ConfigMap", config.metadata.name, namespace, forged)
        pod = {"spec": {"containers": [{"name": "trainer", "image": "a"}]}}
        forge(world, "Pod", coordinator.metadata.name, namespace, pod)
        world.kubelet.exit(namespace, coordinator.metadata.name, 0, said)
        operator.stop()
        operator.start().wait_leading()  # it lists what there is, and has seen all of this
        world.prepare("job")
        world.wait(lambda: len(world.pods()) == 1, "the worker")
        (worker,) = world.pods()
        assert worker.spec.containers[0].image == "test.invalid/trainer:1"
        world.run("job", 1)
    assert world.core.list_namespaced_pod(world.namespace).items


def test_a_job_of_another_controller_is_left_alone(world: World, operator: RunningOperator) -> None:
    created = world.create("theirs", changes={"spec.managedBy": "example.com/dispatcher"})
    make(world)
    operator.wait_quiet()
    assert world.job("theirs") == created
    assert world.pods(job="theirs") == world.pods("coordinator", "theirs") == []
    assert not [each for each in world.children() if each.metadata.name.startswith("theirs-")]
    assert world.events("theirs") == []


def test_an_accepted_job_takes_changes_to_what_is_mutable_and_no_other(world: World) -> None:
    world.create("job")
    world.wait(lambda: world.status("job").get("resolved"), "it to be accepted")
    messages = {each.field: each.message for each in TRANSITIONS}
    told = {}
    for name, value in OTHER.items():
        change = value
        for part in reversed(name.split(".")):
            change = {part: change}
        text = json.dumps({"spec": change})
        patch = ("patch", "cptjob", "job", "--type=merge", f"-p={text}", "--dry-run=server")
        done = world.plane.try_kubectl(*patch, "-n", world.namespace)
        if done.returncode != 0:
            told[name] = done.stderr
    assert told.keys() == OTHER.keys() - set(MUTABLE)
    for name, text in told.items():
        assert f"spec.{name}: " in text
        assert text.rstrip().endswith(messages[f"spec.{name}"])
