"""What the operator knows of the cluster, kept small: jobs as bytes, pods and nodes as values.

Watch events, answers to our own writes and lists all come in here, in any order: of each object the
newest version wins. What a list no longer holds has gone, unless it is newer than the list.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_core import from_json

from cptjob_operator.edge import parse
from cptjob_operator.identity import JobId, JobKey, PodId
from cptjob_operator.objects.children import PROFILE_FILE
from cptjob_operator.observed import Child, Node, Pod

#: Uids of pods that are gone, remembered so that a late answer does not bring one back.
_GRAVES = 10_000
#: Names of a job's pods that went without an end; more are not worth their memory.
_VANISHED = 2_000
#: Seconds that news of a pod may wait for more, for each pod of its job.
SECONDS_A_POD = 0.0002


@dataclass(slots=True)
class Job:
    """A job as it was last seen, as JSON: it is parsed when a pass looks at it."""

    key: JobKey
    uid: str
    version: int
    generation: int
    parts: parse.JobParts
    phase: str
    excluded: int

    @property
    def id(self) -> JobId:
        return JobId(self.key.namespace, self.uid)


@dataclass(slots=True)
class _Pods:
    """The pods of one job, by their own uid."""

    live: dict[str, Pod] = field(default_factory=dict)
    #: Ended and deleted before any pass saw the end.
    ghosts: dict[str, Pod] = field(default_factory=dict)
    vanished: dict[PodId, None] = field(default_factory=dict)


class Cache:
    """The state of everything that is watched.

    changed: is told each job that may need a pass, and in how many seconds.
    """

    def __init__(
        self, changed: Callable[[JobKey, float], None] = lambda key, seconds: None
    ) -> None:
        self.changed = changed
        self.jobs: dict[JobKey, Job] = {}
        self.nodes: dict[str, Node] = {}
        self._node_versions: dict[str, int] = {}
        self._keys: dict[JobId, JobKey] = {}
        self._pods: dict[JobId, _Pods] = {}
        self._children: dict[JobId, dict[tuple[str, str], Child]] = {}  # by kind and name
        self._child_versions: dict[str, int] = {}
        self._profiles: dict[JobId, str] = {}  # frozen, as JSON
        self._graves: OrderedDict[str, None] = OrderedDict()
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._job_graves: OrderedDict[str, None] = OrderedDict()

    # --- jobs ---

    def put_job(self, body: Mapping[str, Any], own: bool = False) -> bool:
        """True when this is news. `own`: it answers our own write, so no pass needs to know."""
        about = body["metadata"]
        uid, version = about["uid"], parse.version(body)
        if uid in self._job_graves:
            return False
        key = JobKey(about["namespace"], about["name"])
        known = self.jobs.get(key)
        if known is not None and version <= known.version:
            return False
        if known is not None and known.uid != uid:
            self._forget(known)
        status = body.get("status")
        status = status if isinstance(status, dict) else {}
        excluded = status.get("excludedNodes")
        self.jobs[key] = Job(
            key,
            uid,
            version,
            about.get("generation") or 0,
            parse.job(body),
            str(status.get("phase") or ""),
            len(excluded) if isinstance(excluded, list) else 0,
        )
        self._keys[self.jobs[key].id] = key
        if not own:
            self.changed(key, 0.0)
        return True

    def drop_job(self, key: JobKey, uid: str) -> None:
        """The job of that uid is gone, and with it everything that it owns."""
        _bury(self._job_graves, uid)
        known = self.jobs.get(key)
        if known is not None and known.uid == uid:
            del self.jobs[key]
            self._forget(known)
            self.changed(key, 0.0)

    def _forget(self, job: Job) -> None:
        self._keys.pop(job.id, None)
        self._pods.pop(job.id, None)
        for child in self._children.pop(job.id, {}).values():
            self._child_versions.pop(child.uid, None)
        self._profiles.pop(job.id, None)

    def replace_jobs(self, seen: Mapping[JobKey, str], version: int) -> None:
        """`seen` (key -> uid) is everything that there was at `version`; all others are gone."""
        for key, job in list(self.jobs.items()):
            if seen.get(key) != job.uid and job.version <= version:
                self.drop_job(key, job.uid)

    # --- pods ---

    def put_pod(self, body: Mapping[str, Any], own: bool = False) -> bool:
        """True when this is news. `own`: it answers our own write, so no pass needs to know."""
        pod = parse.pod(body)
        if pod is None or pod.uid in self._graves:
            return False
        pods = self._pods.setdefault(pod.job, _Pods())
        known = pods.live.get(pod.uid)
        if known is not None and pod.version <= known.version:
            return False
        pods.live[pod.uid] = pod
        if known is not None and replace(known, version=pod.version) == pod:
            return False  # only what nobody here looks at
        if not own:
            self._tell(pod)
        return True

    def drop_pod(self, body: Mapping[str, Any]) -> None:
        """The pod is gone; `body` is the last that was seen of it."""
        pod = parse.pod(body)
        if pod is not None:
            self._bury_pod(pod)

    def lost_pod(self, job: JobId, pod_uid: str) -> None:
        """The API server says that there is no such pod."""
        pods = self._pods.get(job)
        if pods is not None:
            pods.ghosts.pop(pod_uid, None)
            if pod_uid in pods.live:
                self._bury_pod(pods.live[pod_uid])

    def asked_to_go(self, pod_uid: str) -> None:
        """We delete this pod ourselves: that it goes is no news, and no failure."""
        _bury(self._asked, pod_uid)

    def _bury_pod(self, pod: Pod) -> None:
        _bury(self._graves, pod.uid)
        pods = self._pods.get(pod.job)
        if pods is None:
            return
        known = pods.live.pop(pod.uid, None)
        if known is None:
            return
        if pod.uid not in self._asked:
            if pod.finished:
                pods.ghosts[pod.uid] = pod
            else:
                pods.vanished[pod.id] = None
                while len(pods.vanished) > _VANISHED:
                    del pods.vanished[next(iter(pods.vanished))]
        self._asked.pop(pod.uid, None)
        if not pods.live and pod.job not in self._keys:
            del self._pods[pod.job]  # the garbage collector took the last pod of a deleted job
        self._tell(pod)

    def replace_pods(self, seen: Iterable[str], version: int) -> None:
        """`seen` are the uids of all pods that there were at `version`; all others are gone."""
        uids = set(seen)
        for pods in list(self._pods.values()):
            for pod in list(pods.live.values()):
                if pod.uid not in uids and pod.version <= version:
                    self._bury_pod(pod)

    def _tell(self, pod: Pod) -> None:
        key = self._keys.get(pod.job)
        if key is not None:
            # A pass looks at every pod of its job: a large gang gets one for many of their events.
            self.changed(key, SECONDS_A_POD * len(self._pods[pod.job].live))

    def pods_of(self, job: JobId) -> tuple[tuple[Pod, ...], frozenset[PodId]]:
        """The job's pods, and the identities of those that went without an end."""
        pods = self._pods.get(job)
        if pods is None:
            return (), frozenset()
        return (*pods.live.values(), *pods.ghosts.values()), frozenset(pods.vanished)

    def seen(self, job: JobId, pods: Iterable[Pod]) -> None:
        """A pass has done what follows from `pods`: the ghosts among them may rest."""
        known = self._pods.get(job)
        if known is not None and known.ghosts:
            for pod in pods:
                known.ghosts.pop(pod.uid, None)

    def all_pods(self) -> Iterable[Pod]:
        for pods in self._pods.values():
            yield from pods.live.values()

    def key_of(self, job: JobId) -> JobKey | None:
        return self._keys.get(job)

    # --- nodes ---

    def put_node(self, body: Mapping[str, Any]) -> bool:
        """True when something that placement looks at has changed."""
        node, version = parse.node(body), parse.version(body)
        if version <= self._node_versions.get(node.name, -1):
            return False
        self._node_versions[node.name] = version
        news = self.nodes.get(node.name) != node
        if news:
            self.nodes[node.name] = node
            self._tell_of_node(node.name)
        return news

    def drop_node(self, name: str) -> None:
        self._node_versions.pop(name, None)
        if self.nodes.pop(name, None) is not None:
            self._tell_of_node(name)

    def replace_nodes(self, seen: Iterable[str], version: int) -> None:
        names = set(seen)
        for name, known in list(self._node_versions.items()):
            if name not in names and known <= version:
                self.drop_node(name)

    def _tell_of_node(self, name: str) -> None:
        """Jobs with a pod there, and jobs that wait for anything, look again."""
        for pods in self._pods.values():
            for pod in pods.live.values():
                if pod.node == name or (pod.node is None and pod.active):
                    self._tell(pod)
                    break
        for job in self.jobs.values():
            if job.phase in ("Pending", "Starting", "Restarting"):
                self.changed(job.key, 0.0)

    # --- children ---

    def put_child(self, kind: str, body: Mapping[str, Any]) -> None:
        """An object of ours beside the pods, from a list or an answer."""
        child, version = parse.child(kind, body), parse.version(body)
        job = parse.job_id(body)
        if job is None or child.name not in parse.child_names(kind, body):
            return
        if version < self._child_versions.get(child.uid, 0):
            return
        self._child_versions[child.uid] = version
        self._children.setdefault(job, {})[kind, child.name] = child
        data = body.get("data")
        if kind == "ConfigMap" and isinstance(data, dict) and child.owner_uid == job.uid:
            self._profiles[job] = str(data.get(PROFILE_FILE) or "")

    def drop_child(self, job: JobId, child: Child) -> None:
        """The API server says that there is no such child."""
        if self._children.get(job, {}).pop((child.kind, child.name), None) is not None:
            self._child_versions.pop(child.uid, None)
        if child.kind == "ConfigMap":
            self._profiles.pop(job, None)

    def replace_children(self, kind: str, seen: Iterable[str], version: int) -> None:
        """`seen` are the uids of all children of that kind that there were at `version`."""
        uids = set(seen)
        for job, children in list(self._children.items()):
            for child in [each for each in children.values() if each.kind == kind]:
                if child.uid in uids or self._child_versions.get(child.uid, 0) > version:
                    continue
                self.drop_child(job, child)
                key = self._keys.get(job)
                if key is not None:
                    self.changed(key, 0.0)

    def children_of(self, job: JobId) -> tuple[Child, ...]:
        return tuple(self._children.get(job, {}).values())

    def profile_of(self, job: JobId) -> str | None:
        """What was frozen at acceptance, as JSON."""
        return self._profiles.get(job)


def document(job: Job) -> dict[str, Any]:
    """The job as a document."""
    value: dict[str, Any] = from_json(job.parts.whole)
    return value


def _bury(graves: OrderedDict[str, None], uid: str) -> None:
    graves[uid] = None
    if len(graves) > _GRAVES:
        graves.popitem(last=False)
