"""From creating a CPTJob to its first step on two real nodes, part by part; and from a loss to the next.

    python bench/startup.py [--rounds 3] [--print]      Linux, root; see tests/node

Times are those of this machine's one clock: when a watch told of a pod, when the kernel started a
process, when a container printed a line, when a step's numbers were written. A part ends with the
slower of the two workers.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("node", "cluster", "chart", "api")]

import results  # noqa: E402
from kubernetes import client, watch  # noqa: E402
from team import LONG, VALUES, Team  # noqa: E402

from helmchart import CHART, NAME, NAMESPACE, Helm  # noqa: E402
from testnodes.cluster import Cluster  # noqa: E402
from testplane import binaries  # noqa: E402

NODES = ("node-a", "node-b")
GROUP, VERSION, PLURAL = "training.cptjob.io", "v1alpha1", "cptjobs"
FILES = [
    *("bench/startup.py", "operator/cptjob_operator"),
    *results.trainer("run/coordinator run/launch run/agent run/worker data/prepare"),
]
_POLL_SECONDS = 0.01
#: After this a bench has failed.
_PATIENCE_SECONDS = 240.0
#: Parts that Kubernetes, Python's imports or the size of the model decide.
OTHERS = {"schedule", "start", "import", "trial", "load"}
TARGET_SECONDS = 5.0

Parts = list[tuple[str, str, float]]


# --- what is seen ---


@dataclass
class Pod:
    role: str
    seen: float
    bound: float = 0.0


@dataclass
class Seen:
    """Everything that was seen of one namespace; seconds since the epoch."""

    pods: dict[str, Pod] = field(default_factory=dict)
    #: Processes by pid: what they are, and when the kernel started them.
    processes: dict[int, tuple[str, float]] = field(default_factory=dict)
    #: Steps in the order in which their numbers were written.
    steps: list[tuple[float, int]] = field(default_factory=list)

    def started(self, kind: str, since: float) -> list[float]:
        return sorted(
            when for what, when in self.processes.values() if what == kind and when > since
        )

    def of(self, role: str, since: float) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.role == role and pod.seen > since]

    def step_after(self, when: float) -> float:
        """When the first step after `when` was written, 0 as long as there is none."""
        return next((at for at, _ in self.steps if at > when), 0.0)


@contextmanager
def watching(cluster: Cluster, team: Team, job: str) -> Iterator[Seen]:
    seen, ended = Seen(), threading.Event()
    threads = [
        threading.Thread(target=_watch_pods, args=(cluster, team.namespace, seen, ended)),
        threading.Thread(target=_watch_processes, args=(seen, ended)),
        threading.Thread(target=_watch_steps, args=(team.output(job), seen, ended)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _watch_pods(cluster: Cluster, namespace: str, seen: Seen, ended: threading.Event) -> None:
    with cluster.plane.api() as api:
        core = client.CoreV1Api(api)
        while not ended.is_set():
            events = watch.Watch().stream(core.list_namespaced_pod, namespace, timeout_seconds=2)
            for event in events:
                now, pod = time.time(), event["object"]
                role = (pod.metadata.labels or {}).get(f"{GROUP}/role", "")
                known = seen.pods.setdefault(pod.metadata.name, Pod(role, now))
                if pod.spec.node_name and not known.bound:
                    known.bound = now


def _watch_processes(seen: Seen, ended: threading.Event) -> None:
    booted = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    ticks = os.sysconf("SC_CLK_TCK")
    other: set[int] = set()
    while not ended.wait(_POLL_SECONDS):
        for pid in (int(each) for each in os.listdir("/proc") if each.isdigit()):
            if pid in seen.processes or pid in other:
                continue
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            kind = _kind(command, seen.processes.get(int(fields[1]), ("", 0.0))[0])
            if kind:
                seen.processes[pid] = kind, booted + int(fields[19]) / ticks
            elif command and b"runc" not in command:
                other.add(pid)  # its command line stays as it is


def _kind(command: bytes, parent: str) -> str:
    """What a process is by its command line and its parent's kind, "" for any other."""
    for name in ("coordinator", "launch"):
        if f"cptjob_trainer.run.{name}".encode() in command:
            return name
    if b"multiprocessing.forkserver" in command:
        return "rank" if parent == "forkserver" else "forkserver"
    return ""


def _watch_steps(output: Path, seen: Seen, ended: threading.Event) -> None:
    path, size = output / "metrics.jsonl", 0
    while not ended.wait(_POLL_SECONDS):
        try:
            now = path.stat().st_size
        except OSError:
            continue
        if now < size:
            size = 0  # it was cut to the checkpoint that training continues from
        if now > size:
            text = path.read_bytes()[size:now]
            whole = text[: text.rfind(b"\n") + 1]
            size += len(whole)
            last = max((step for _, step in seen.steps), default=0)
            for line in map(json.loads, whole.splitlines()):
                if "loss" in line and (line["step"] > last or not seen.steps or size == len(whole)):
                    seen.steps.append((time.time(), line["step"]))


def lines(team: Team, role: str, words: str, since: float) -> list[float]:
    """When containers of that role printed a line with these words."""
    found = []
    for pod in team.pods(JOB, role):
        text = team.kubectl("logs", "--timestamps", pod["metadata"]["name"])
        for line in text.splitlines():
            stamp, _, said = line.partition(" ")
            when = datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z", r"\1+00:00", stamp)).timestamp()
            if words in said and when > since:
                found.append(when)
    return sorted(found)


# --- what is measured ---

JOB = "job"


def until(happened: Callable[[], Any], what: str) -> Any:
    limit = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < limit:
        if found := happened():
            return found
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"no {what} in {_PATIENCE_SECONDS:.0f} s")


def create(cluster: Cluster, team: Team, changes: dict[str, Any] | None = None) -> float:
    """Creates the job with a plain request, as kubectl's own start is none of ours."""
    body = team.manifest(JOB, changes)
    with cluster.plane.api() as api:
        begun = time.time()
        client.CustomObjectsApi(api).create_namespaced_custom_object(
            GROUP, VERSION, team.namespace, PLURAL, body
        )
    return begun


def start(cluster: Cluster, team: Team) -> Parts:
    """From the creation to the first step."""
    with watching(cluster, team, JOB) as seen:
        begun = create(cluster, team)
        first = until(lambda: seen.step_after(begun), "first step")
        team.wait_for(JOB, "Complete")
    (coordinator,) = seen.of("coordinator", begun)
    workers = seen.of("worker", begun)
    launched = max(seen.started("launch", begun))
    marks = [
        ("reconcile", "the coordinator's pod is there", coordinator.seen),
        ("schedule", "it has a node", coordinator.bound),
        ("start", "its process runs", seen.started("coordinator", begun)[0]),
        ("import", "it begins to prepare", lines(team, "coordinator", "Preparing", begun)[0]),
        ("prepare", "text is tokenised", lines(team, "coordinator", "Tokenising, 100", begun)[-1]),
        (
            "trial",
            "the architecture has been tried (torch and transformers are imported for it)",
            lines(team, "coordinator", "Laying out rows", begun)[0],
        ),
        ("prepare", "data is ready", lines(team, "coordinator", "prepared", begun)[0]),
        ("reconcile", "both workers' pods are there", max(each.seen for each in workers)),
        ("schedule", "both have nodes", max(each.bound for each in workers)),
        ("start", "their launchers run", launched),
        ("import", "their training processes run", max(seen.started("rank", begun))),
        ("rendezvous", "they have met", max(lines(team, "worker", " of 2 on ", begun))),
        ("load", "the model is loaded", lines(team, "worker", "Evaluating: the base", begun)[0]),
        ("first step", "the base is evaluated, and step 1 done", first),
    ]
    return _parts(begun, marks)


def kill(cluster: Cluster, team: Team) -> Parts:
    """From the death of a training process to the next step."""

    def fault(seen: Seen) -> None:
        for node in cluster.nodes.values():
            processes = node.processes("multiprocessing.forkserver")
            if len(processes) > 1:
                node.machine.run("kill", "-KILL", processes[-1])
                return
        raise RuntimeError("no node has a training process")

    with _disturbed(cluster, team, fault) as (seen, begun):
        marks = [
            ("restart", "new training processes run", max(seen.started("rank", begun))),
            *_going_on(team, seen, begun),
        ]
    return _parts(begun, marks)


def delete(cluster: Cluster, team: Team) -> Parts:
    """From the deletion of a worker's pod to the next step of all workers."""

    def fault(seen: Seen) -> None:
        name = team.living(JOB)[1]["metadata"]["name"]
        team.kubectl("delete", "pod", name, "--wait=false")

    with _disturbed(cluster, team, fault) as (seen, begun):
        pods = seen.of("worker", begun)
        marks = [
            ("save and replace", "new pods are there", max(each.seen for each in pods)),
            ("schedule", "they have nodes", max(each.bound for each in pods)),
            ("start", "their launchers run", max(seen.started("launch", begun))),
            ("import", "new training processes run", max(seen.started("rank", begun))),
            *_going_on(team, seen, begun),
        ]
    return _parts(begun, marks)


@contextmanager
def _disturbed(
    cluster: Cluster, team: Team, fault: Callable[[Seen], None]
) -> Iterator[tuple[Seen, float]]:
    """A job that trains, has a checkpoint and is disturbed; ends once all ranks train again."""
    with watching(cluster, team, JOB) as seen:
        create(cluster, team, LONG)
        team.wait_for_checkpoint(JOB, 1)
        begun = time.time()
        fault(seen)
        until(lambda: len(seen.started("rank", begun)) >= 2, "new training processes")
        again = max(seen.started("rank", begun))
        until(lambda: seen.step_after(again), "step after it")
        yield seen, begun
    team.kubectl("delete", "cptjob", JOB, "--wait=true")


def _going_on(team: Team, seen: Seen, begun: float) -> list[tuple[str, str, float]]:
    met = max(lines(team, "worker", " of 2 on ", begun))
    loaded = lines(team, "worker", "continuing after step", begun)[-1]
    return [
        ("rendezvous", "they have met", met),
        ("load", "model and checkpoint are loaded", loaded),
        ("first step", "the next step is done", seen.step_after(loaded)),
    ]


def _parts(begun: float, marks: list[tuple[str, str, float]]) -> Parts:
    """Each part's own seconds. A mark that an earlier one overtook took none."""
    found, last = [], begun
    for name, until_when, when in marks:
        found.append((name, until_when, max(0.0, when - last)))
        last = max(last, when)
    return found


KINDS = {"start": start, "kill": kill, "delete": delete}
TITLES = {
    "start": "from creation to the first step",
    "kill": "a training process is killed",
    "delete": "a worker's pod is deleted",
}


# --- the figures in words ---


def report(kind: str, rounds: list[Parts]) -> str:
    rows = []
    for number, (name, what, _) in enumerate(rounds[0]):
        seconds = [parts[number][2] for parts in rounds]
        rows.append([name, what, _spread(seconds), "" if name in OTHERS else "ours"])
    whole = [sum(each for _, _, each in parts) for parts in rounds]
    own = [sum(each for name, _, each in parts if name not in OTHERS) for parts in rounds]
    rows.append(["**all**", "", _spread(whole), ""])
    judged = ""
    if kind == "start":
        reached = "reached" if median(own) <= TARGET_SECONDS else "**not reached**"
        judged = f"{TARGET_SECONDS:.0f}: {reached}"
    rows.append(["**ours**", "", _spread(own), judged])
    return results.table([TITLES[kind], "until", "s", ""], rows)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@contextmanager
def operated() -> Iterator[Cluster]:
    """Two nodes and the operator, as helm installs it."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-startup-") as folder,
        Cluster(Path(folder) / "cluster", NODES) as cluster,
    ):
        cluster.plane.kubectl("create", "namespace", NAMESPACE)
        helm = Helm(binaries.find(["helm"])["helm"], Path(folder), cluster.plane.kubeconfig)
        wait = ["--wait", "--timeout", "2m"]
        helm.run("install", NAME, str(CHART), "-n", NAMESPACE, *wait, values=VALUES)
        yield cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench/startup.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--print", action="store_true", help="write no results")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.inside:  # in a network of its own
        own = ["unshare", "--net", sys.executable, *sys.argv, "--inside"]
        os.execvp(own[0], own)
    measured: dict[str, list[Parts]] = {name: [] for name in asked.only}
    with operated() as cluster:
        start(cluster, Team(cluster, _namespace(cluster, "warm-up")))
        for number in range(asked.rounds):
            for name, rounds in measured.items():
                team = Team(cluster, _namespace(cluster, f"{name}-{number}"))
                rounds.append(KINDS[name](cluster, team))
                told = [(part, round(each, 2)) for part, _, each in rounds[-1]]
                print(name, told, file=sys.stderr)
    text = "\n\n".join(
        [
            "The tiny example, one worker of one process on each of two nodes, on two cores in all;"
            " images are on the nodes.",
            *(report(name, rounds) for name, rounds in measured.items()),
        ]
    )
    print(text)
    if not asked.print and set(asked.only) == set(KINDS):
        results.write("startup", text, FILES)
    return 0


def _namespace(cluster: Cluster, name: str) -> str:
    cluster.plane.kubectl("create", "namespace", name)
    return name


if __name__ == "__main__":
    sys.exit(main())
