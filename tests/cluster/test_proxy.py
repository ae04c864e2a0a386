"""The proxy that does harm between a client and the API server."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from testplane.plane import ControlPlane
from testplane.proxy import FaultProxy

WRITER = Path(__file__).with_name("standin_writer.py")
StartWriter = Callable[[int], subprocess.Popen[str]]


@pytest.fixture(name="proxy")
def start_proxy(plane: ControlPlane, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(plane, tmp_path / "proxy") as proxy:
        yield proxy


@pytest.fixture(name="far")
def make_far(proxy: FaultProxy) -> Iterator[client.CoreV1Api]:
    """A client behind the proxy."""
    with config.new_client_from_config(str(proxy.kubeconfig())) as api:
        yield client.CoreV1Api(api)


@pytest.fixture(name="start_writer")
def make_start_writer(proxy: FaultProxy, namespace: str) -> Iterator[StartWriter]:
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(WRITER), str(proxy.kubeconfig()), namespace, str(count)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def make_map(core: client.CoreV1Api, namespace: str, name: str) -> None:
    core.create_namespaced_config_map(namespace, {"metadata": {"name": name}})


def maps(core: client.CoreV1Api, namespace: str) -> list[str]:
    names = [each.metadata.name for each in core.list_namespaced_config_map(namespace).items]
    return sorted(name for name in names if name != "kube-root-ca.crt")


def test_it_passes_on_what_it_is_given(
    far: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    make_map(far, namespace, "one")
    assert maps(far, namespace) == maps(core, namespace) == ["one"]
    text = "é" * 700_000  # more than one buffer
    far.patch_namespaced_config_map("one", namespace, {"data": {"text": text[:400_000]}})
    assert core.read_namespaced_config_map("one", namespace).data == {"text": text[:400_000]}
    with pytest.raises(client.ApiException) as refused:
        make_map(far, namespace, "one")
    assert refused.value.status == 409


def test_kubectl_works_through_it(plane: ControlPlane, proxy: FaultProxy, namespace: str) -> None:
    far = ["--kubeconfig", str(proxy.kubeconfig()), "-n", namespace]
    plane.kubectl(*far, "create", "configmap", "one")
    plane.kubectl(*far, "wait", "--for=create", "configmap/one")
    assert "one" in plane.kubectl(*far, "get", "configmaps")


def test_writes_are_numbered_and_told_by_resource(
    proxy: FaultProxy, far: client.CoreV1Api, namespace: str
) -> None:
    make_map(far, namespace, "one")
    maps(far, namespace)
    far.patch_namespace_status(namespace, {"metadata": {"labels": {"a": "b"}}})
    far.delete_namespaced_config_map("one", namespace)
    told = [(each.number, each.method, each.resource, each.code) for each in proxy.writes]
    assert told == [
        (1, "POST", "configmaps", 201),
        (2, "PATCH", "namespaces/status", 200),
        (3, "DELETE", "configmaps", 200),
    ]
    assert len(proxy.calls) == 4
    proxy.reset()
    assert proxy.calls == []
    make_map(far, namespace, "two")
    assert [each.number for each in proxy.writes] == [1]


def test_a_lease_is_written_without_a_number(proxy: FaultProxy, namespace: str) -> None:
    with config.new_client_from_config(str(proxy.kubeconfig())) as api:
        leases = client.CoordinationV1Api(api)
        leases.create_namespaced_lease(namespace, {"metadata": {"name": "leader"}})
    assert [each.resource for each in proxy.calls] == ["leases"]
    assert proxy.writes == []


@pytest.mark.parametrize("number", [1, 3])
def test_a_client_killed_before_the_answer_has_written_and_does_not_know(
    number: int,
    proxy: FaultProxy,
    start_writer: StartWriter,
    core: client.CoreV1Api,
    namespace: str,
) -> None:
    writer = start_writer(5)
    killed = proxy.kill_before(number, writer.kill)
    assert killed.wait()
    known, _ = writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert known.split() == [f"map-{each}" for each in range(1, number)]
    assert maps(core, namespace) == [f"map-{each}" for each in range(1, number + 1)]


@pytest.mark.parametrize("number", [1, 3])
def test_a_client_killed_after_the_answer_knows_it_and_writes_no_more(
    number: int,
    proxy: FaultProxy,
    start_writer: StartWriter,
    core: client.CoreV1Api,
    namespace: str,
) -> None:
    writer = start_writer(5)
    killed = proxy.kill_after(number, writer.kill)
    assert killed.wait()
    known, _ = writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert known.split() == [f"map-{each}" for each in range(1, number + 1)]
    assert maps(core, namespace) == [f"map-{each}" for each in range(1, number + 1)]


def test_the_next_client_writes_on_through_the_same_proxy(
    proxy: FaultProxy, start_writer: StartWriter, core: client.CoreV1Api, namespace: str
) -> None:
    writer = start_writer(2)
    assert proxy.kill_before(1, writer.kill).wait()
    known, _ = start_writer(2).communicate()
    assert known.split() == ["409", "map-2"]
    assert maps(core, namespace) == ["map-1", "map-2"]


def test_a_kill_that_never_came_is_not_said_to_have_happened(
    proxy: FaultProxy, start_writer: StartWriter
) -> None:
    writer = start_writer(2)
    killed = proxy.kill_before(3, writer.kill)
    writer.communicate()
    assert not killed.happened
    assert len(proxy.writes) == 2


def test_a_number_that_has_passed_is_refused(
    proxy: FaultProxy, far: client.CoreV1Api, namespace: str
) -> None:
    make_map(far, namespace, "one")
    with pytest.raises(ValueError, match="write 1 has passed already; there were 1"):
        proxy.fail(1, 409)


@pytest.mark.parametrize(
    ("code", "reason"), [(409, "Conflict"), (422, "Invalid"), (429, "TooManyRequests")]
)
@pytest.mark.parametrize("reaches", [False, True])
def test_a_write_can_be_refused_whether_it_was_done_or_not(
    code: int,
    reason: str,
    reaches: bool,
    proxy: FaultProxy,
    far: client.CoreV1Api,
    core: client.CoreV1Api,
    namespace: str,
) -> None:
    failed = proxy.fail(2, code, reaches=reaches)
    make_map(far, namespace, "one")
    with pytest.raises(client.ApiException) as refused:
        make_map(far, namespace, "two")
    assert failed.happened
    assert refused.value.status == code
    assert json.loads(refused.value.body)["reason"] == reason
    assert refused.value.headers.get("Retry-After") == ("1" if code == 429 else None)
    make_map(far, namespace, "three")
    assert maps(core, namespace) == ["one", "three", *(["two"] if reaches else [])]


def test_a_write_can_be_held_until_its_client_is_dead(
    proxy: FaultProxy, start_writer: StartWriter, core: client.CoreV1Api, namespace: str
) -> None:
    held = proxy.hold(2)
    writer = start_writer(2)
    assert held.wait()
    writer.kill()
    writer.communicate()
    assert maps(core, namespace) == ["map-1"]
    watcher = Watcher(core, namespace, version_of(core, namespace))
    held.release()
    assert watcher.wait_for_event()["object"]["metadata"]["name"] == "map-2"


# --- watches --------------------------------------------------------------------------------------


class Watcher:
    """One raw watch on ConfigMaps, read in a thread."""

    def __init__(self, core: client.CoreV1Api, namespace: str, version: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._answer = core.list_namespaced_config_map(
            namespace, watch=True, resource_version=version, _preload_content=False
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._seen = threading.Semaphore(0)
        self._thread.start()

    def _read(self) -> None:
        rest = b""
        try:
            for chunk in self._answer.stream(decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self.events.append(json.loads(line))
                    self._seen.release()
        except Exception:  # whatever the client library makes of a broken connection
            return

    def wait_for_event(self) -> dict[str, Any]:
        assert self._seen.acquire(timeout=60)
        return self.events[-1]

    def wait_for_end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def version_of(core: client.CoreV1Api, namespace: str) -> str:
    version: str = core.list_namespaced_config_map(namespace).metadata.resource_version
    return version


def test_an_event_passes_while_the_watch_is_open(
    far: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    watcher = Watcher(far, namespace, version_of(core, namespace))
    for name in ("one", "two"):
        make_map(core, namespace, name)
        assert watcher.wait_for_event()["object"]["metadata"]["name"] == name


def test_watches_can_be_cut_and_come_back(
    proxy: FaultProxy, far: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    version = version_of(core, namespace)
    watcher = Watcher(far, namespace, version)
    assert proxy.cut_watches() == 1
    watcher.wait_for_end()
    assert proxy.open_watches == 0
    make_map(core, namespace, "one")
    again = Watcher(far, namespace, version)
    assert again.wait_for_event()["object"]["metadata"]["name"] == "one"


def test_a_watch_can_be_told_that_its_version_is_gone_once(
    proxy: FaultProxy, far: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    version = version_of(core, namespace)
    first = Watcher(far, namespace, version)
    proxy.cut_watches(expire=True)
    first.wait_for_end()
    second = Watcher(far, namespace, version)
    event = second.wait_for_event()
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
    second.wait_for_end()
    make_map(core, namespace, "one")
    third = Watcher(far, namespace, version)
    assert third.wait_for_event()["object"]["metadata"]["name"] == "one"


def test_no_watch_comes_back_before_the_gap_is_over(
    proxy: FaultProxy,
    plane: ControlPlane,
    far: client.CoreV1Api,
    core: client.CoreV1Api,
    namespace: str,
) -> None:
    make_map(core, namespace, "one")
    version = version_of(core, namespace)
    first = Watcher(far, namespace, version)
    back: list[Watcher] = []
    thread = threading.Thread(target=lambda: back.append(Watcher(far, namespace, version)))
    with proxy.no_watches(expire=True):
        first.wait_for_end()
        thread.start()
        plane.wait(lambda: len(proxy.calls) == 2, "the watch to be asked for again")
        core.delete_namespaced_config_map("one", namespace)
        assert back == []
    thread.join()
    assert back[0].wait_for_event()["object"]["code"] == 410


def test_a_client_that_is_gone_leaves_no_watch_behind(
    proxy: FaultProxy, plane: ControlPlane, namespace: str
) -> None:
    command = ["--kubeconfig", str(proxy.kubeconfig()), "-n", namespace, "get", "cm", "--watch"]
    kubectl = subprocess.Popen([plane.programs["kubectl"], *command], stdout=subprocess.PIPE)
    assert kubectl.stdout is not None
    kubectl.stdout.readline()
    plane.wait(lambda: proxy.open_watches == 1, "the watch to open")
    kubectl.kill()
    kubectl.communicate()
    plane.wait(lambda: proxy.open_watches == 0, "the watch to end")


def test_without_an_api_server_the_connection_breaks(
    proxy: FaultProxy, plane: ControlPlane, far: client.CoreV1Api, namespace: str
) -> None:
    with plane.apiserver_down(), pytest.raises(Exception, match=r"Connection|Max retries"):
        make_map(far, namespace, "one")
    make_map(far, namespace, "two")
    assert maps(far, namespace) == ["two"]
