"""Definitions of other projects' resources, as their Go modules carry them: Prometheus, GitOps, Kueue.

`python -m testplane.definitions` fetches them ahead of the tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from testplane.binaries import ToolError, find_go, to_stderr
from testplane.plane import ControlPlane


@dataclass(frozen=True)
class Source:
    """Definitions in one Go module. digest: of the module's files, as go.sum has it."""

    module: str
    version: str
    digest: str
    files: tuple[str, ...]


_MONITORING = "example/prometheus-operator-crd/monitoring.coreos.com_"
SOURCES = {
    "monitoring": Source(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        tuple(
            f"{_MONITORING}{kind}.yaml"
            for kind in ("servicemonitors", "podmonitors", "prometheusrules")
        ),
    ),
    "flux-source": Source(
        "github.com/fluxcd/source-controller",
        "v1.9.6",
        "h1:nG534/bI6nVpyHra7ONAk6xDB3xPsVT+EOLHZHXPrrc=",
        ("config/crd/bases/source.toolkit.fluxcd.io_gitrepositories.yaml",),
    ),
    "flux-kustomize": Source(
        "github.com/fluxcd/kustomize-controller",
        "v1.9.6",
        "h1:XB+G3A0mky0j5uVHZWv4oSlS2RvZBoNIUhstIvY0JKE=",
        ("config/crd/bases/kustomize.toolkit.fluxcd.io_kustomizations.yaml",),
    ),
    "argo": Source(
        "github.com/argoproj/argo-cd/v3",
        "v3.5.7",
        "h1:Xm1BF+I5OgDKUG3SDK49vn2/Y5AMyaNVko+/JT08gj0=",
        ("manifests/crds/application-crd.yaml",),
    ),
    "kueue": Source(
        "sigs.k8s.io/kueue",
        "v0.19.2",
        "h1:mPNzr37u0nwI7ikST5QQl5gg6EgtYOAvC9ZbTgywdN8=",
        tuple(
            f"config/components/crd/bases/kueue.x-k8s.io_{kind}.yaml"
            for kind in ("resourceflavors", "clusterqueues", "localqueues")
        ),
    ),
}


def find(names: Iterable[str]) -> list[Path]:
    """The files of these sources, downloaded where they are not there yet. Raises ToolError."""
    return [path for name in names for path in _files(SOURCES[name])]


@contextmanager
def installed(plane: ControlPlane, names: Iterable[str]) -> Iterator[None]:
    """Within the with statement their kinds are served. Raises ToolError."""
    files = find(names)
    for file in files:
        # Some are too large for the annotation of a client-side apply.
        plane.kubectl("create", "-f", str(file))
        for path in _served(yaml.safe_load(file.read_text("utf-8"))["spec"]):
            plane.wait(partial(_answers, plane, path), f"{path} to be served")
    try:
        yield
    finally:
        for file in files:
            plane.kubectl("delete", "-f", str(file))


def _served(spec: dict[str, Any]) -> Iterator[str]:
    """What answers once kubectl can find the kind."""
    for version in spec["versions"]:
        if version["served"]:
            group = f"/apis/{spec['group']}/{version['name']}"
            yield from (group, f"{group}/{spec['names']['plural']}")


def _answers(plane: ControlPlane, path: str) -> bool:
    return plane.get(path)[0] == 200


def _files(source: Source) -> list[Path]:
    go = find_go()
    if go is None:
        raise ToolError(
            f"`go` is needed to fetch {source.module}: run `make tools` or install it "
            "(https://go.dev/dl)"
        )
    # Outside of any module, so that only `digest` says what is right.
    environment = os.environ | {"GOFLAGS": "", "GOWORK": "off"}
    done = subprocess.run(
        [go, "mod", "download", "-json", f"{source.module}@{source.version}"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout or "{}")
    if done.returncode != 0:
        raise ToolError(f"{source.module} {source.version}: {told.get('Error') or done.stderr}")
    if told["Sum"] != source.digest:
        raise ToolError(f"{source.module} {source.version} is {told['Sum']}, not {source.digest}")
    return [Path(told["Dir"]) / file for file in source.files]


def main() -> int:
    try:
        find(SOURCES)
    except ToolError as error:
        to_stderr(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
