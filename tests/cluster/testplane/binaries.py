"""Kubernetes' own programs: taken from KUBEBUILDER_ASSETS, else built once from Go modules.

Each folder below ../tools is a Go module that pins one group of programs, apart from the others
because their dependencies differ. What is built lies in $XDG_CACHE_HOME/cptjob/tools, keyed by the
pinned versions. `python -m testplane.binaries [GROUP...]` builds ahead of the tests; without a
name, all but those of `SOAK`.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parents[1] / "tools"
ASSETS = "KUBEBUILDER_ASSETS"
PROGRESS_SECONDS = 30.0

Report = Callable[[str], None]


class ToolError(Exception):
    """A program that is needed can neither be found nor built; the message says what to do."""


@dataclass(frozen=True)
class Group:
    """Programs that are built together from one Go module.

    name: the folder below ../tools.
    module: the Go module whose version is theirs.
    programs: import path of each program, by the name that it gets.
    stamps: variables of the linker that take the version, so that the programs tell it.
    tags: build tags.
    beside: the group whose folder it shares.
    """

    name: str
    module: str
    programs: dict[str, str]
    stamps: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    beside: str = ""

    @property
    def folder(self) -> Path:
        return TOOLS / (self.beside or self.name)

    @property
    def version(self) -> str:
        pinned = (self.folder / "go.mod").read_text("utf-8")
        found = re.search(rf"^(?:require)?\s*{re.escape(self.module)} (v\S+)", pinned, re.MULTILINE)
        if found is None:
            raise ToolError(f"{self.folder / 'go.mod'} does not require {self.module}")
        return found[1]

    @property
    def flags(self) -> list[str]:
        stamps = " ".join(f"-X {variable}={self.version}" for variable in self.stamps)
        plain = ["-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags=-s -w {stamps}"]
        return [*plain, f"-tags={','.join(self.tags)}"] if self.tags else plain

    @property
    def key(self) -> str:
        """Another key for other versions, flags or machines."""
        parts = [(self.folder / name).read_bytes() for name in ("go.mod", "go.sum")]
        parts += [path.read_bytes() for path in sorted(self.folder.rglob("*.go"))]
        parts += [
            " ".join([*self.flags, *self.programs, platform.system(), platform.machine()]).encode()
        ]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
_NODE = ("kubelet", "kube-proxy")
_VERSIONS = ("k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion")
_HEALTH = ("kstatus", "argohealth", "fluxhealth")
GROUPS = {
    group.name: group
    for group in (
        Group(
            "kubernetes",
            "k8s.io/kubernetes",
            {name: f"k8s.io/kubernetes/cmd/{name}" for name in _PLANE},
            _VERSIONS,
        ),
        Group(
            "node",
            "k8s.io/kubernetes",
            {name: f"k8s.io/kubernetes/cmd/{name}" for name in _NODE},
            _VERSIONS,
            beside="kubernetes",
        ),
        Group(  # our own: CoreDNS with few plugins, and what holds a pod's namespaces
            "inside",
            "github.com/coredns/coredns",
            {name: f"cptjob/tests/cluster/tools/inside/{name}" for name in ("coredns", "pause")},
        ),
        Group("etcd", "go.etcd.io/etcd/server/v3", {"etcd": "go.etcd.io/etcd/server/v3"}),
        Group("kwok", "sigs.k8s.io/kwok", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}),
        Group(
            "helm",
            "helm.sh/helm/v4",
            {"helm": "helm.sh/helm/v4/cmd/helm"},
            ("helm.sh/helm/v4/internal/version.version",),
        ),
        Group(
            "promtool",
            "github.com/prometheus/prometheus",
            {"promtool": "github.com/prometheus/prometheus/cmd/promtool"},
            ("github.com/prometheus/common/version.Version",),
            ("remove_all_sd",),
        ),
        Group(  # without its pages, which want Node.js
            "prometheus",
            "github.com/prometheus/prometheus",
            {"prometheus": "github.com/prometheus/prometheus/cmd/prometheus"},
            ("github.com/prometheus/common/version.Version",),
            ("remove_all_sd", "enable_kubernetes_sd"),
            beside="promtool",
        ),
        Group(  # our own programs around what GitOps tools judge objects with
            "health",
            "github.com/fluxcd/cli-utils",
            {name: f"cptjob/tests/cluster/tools/health/{name}" for name in _HEALTH},
        ),
    )
}
CONTROL_PLANE = ("etcd", "kubernetes", "kwok")
REAL_NODES = ("node", "inside")
#: Built only where it is named: no everyday test needs it.
SOAK = ("prometheus",)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def past_capture(capture: Any) -> Report:
    """Prints at once, past pytest's capture: a build takes minutes.

    capture: pytest's plugin `capturemanager`.
    """

    def report(line: str) -> None:
        with capture.global_and_fixture_disabled():
            to_stderr(line)

    return report


def find(
    groups: Iterable[str] = CONTROL_PLANE, report: Report = to_stderr, cache: Path | None = None
) -> dict[str, Path]:
    """The path of each program of these groups, by its name; builds what is not there yet.

    Raises ToolError when something can neither be found nor built.
    """
    given = _assets()
    found: dict[str, Path] = {}
    for group in (GROUPS[name] for name in groups):
        present = {
            name: given / name for name in group.programs if given and (given / name).is_file()
        }
        found |= present
        if len(present) < len(group.programs):
            built = _built(group, cache or cache_folder(), report)
            found |= {name: built / name for name in group.programs if name not in present}
    return found


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cptjob" / "tools"


def _assets() -> Path | None:
    named = os.environ.get(ASSETS)
    if not named:
        return None
    if not Path(named).is_dir():
        raise ToolError(f"{ASSETS} names {named}, which is no folder; correct it or unset it")
    return Path(named)


def _built(group: Group, cache: Path, report: Report) -> Path:
    """The folder of the group's programs. Whoever comes first builds, others wait for it."""
    folder = cache / f"{group.name}-{group.version}-{group.key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{group.name}.lock", f"another process builds {group.name}", report):
        if not folder.is_dir():
            _build(group, folder, report)
    return folder


@contextmanager
def _locked(path: Path, busy: str, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{busy}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(group: Group, folder: Path, report: Report) -> None:
    names = ", ".join(group.programs)
    go = find_go()
    if go is None:
        raise ToolError(
            f"`go` is needed to build {names}: run `make tools`, install Go 1.26 or newer "
            f"(https://go.dev/dl), or let {ASSETS} name a folder that has them"
        )
    report(f"building {names} {group.version} from Go modules, once for {folder}")
    started = time.monotonic()
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    _go_build(go, group, unfinished, report)
    for name, path in group.programs.items():
        (unfinished / _name_by_go(path)).rename(unfinished / name)
    unfinished.rename(folder)
    report(f"built {names} in {time.monotonic() - started:.0f} s")


def _name_by_go(path: str) -> str:
    """What `go build` calls a program: the end of its path, but for a major version."""
    return re.sub(r"/v\d+$", "", path).rpartition("/")[2]


def find_go() -> str | None:
    """The Go that is installed, else the one that `make tools` puts beside this Python."""
    beside = Path(sys.executable).parent
    return shutil.which("go") or shutil.which("go", path=str(beside))


def _go_build(go: str, group: Group, into: Path, report: Report) -> None:
    command = [go, "build", *group.flags, "-o", f"{into}/", *group.programs.values()]
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}
    log = into.with_name(f"{into.name}.log")
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=group.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    code = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    report(f"  building {group.name}: {time.monotonic() - started:.0f} s so far")
        finally:
            process.kill()
    if code != 0:
        last = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
        raise ToolError(f"building {group.name} {group.version} failed; `go build` said:\n{last}")
    log.unlink()


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        to_stderr(f"error: no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
        return 64
    try:
        find(names or [name for name in GROUPS if name not in SOAK])
    except ToolError as error:
        to_stderr(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
