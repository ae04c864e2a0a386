"""The chart in the hands of the real helm, and the plain manifests that are made of it.

`python -m helmchart` writes deploy/operator.yaml; `make manifests` does that.
"""

import os
import re
import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testplane import binaries

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "cptjob-operator"
MANIFESTS = ROOT / "deploy" / "operator.yaml"
NAME, NAMESPACE = "cptjob-operator", "cptjob-system"

Object = dict[str, Any]
Values = dict[str, Any]

_HEAD = f"""\
# The operator without helm: the chart with its own values. `make manifests` writes it.
#
#   kubectl apply --server-side -f deploy/operator.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


class HelmError(Exception):
    """helm failed; the message is what it said."""


@dataclass
class Helm:
    """helm on this chart. home: where it keeps its things. kubeconfig: of the cluster, if any."""

    program: Path
    home: Path
    kubeconfig: Path | None = None

    def run(self, *arguments: str, values: Values | None = None) -> str:
        """What it prints. values: in place of some of the chart's own. Raises HelmError."""
        command = [str(self.program), *arguments]
        if values is not None:
            file = self.home / f"values-{secrets.token_hex(4)}.yaml"
            file.write_text(yaml.safe_dump(values))
            command += ["--values", str(file)]
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        if self.kubeconfig is not None:
            environment["KUBECONFIG"] = str(self.kubeconfig)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HelmError(done.stderr + done.stdout)
        return done.stdout

    def template(
        self, values: Values | None = None, *, name: str = NAME, namespace: str = NAMESPACE
    ) -> "Rendered":
        """The objects that the chart makes of these values. Raises HelmError."""
        text = self.run("template", name, str(CHART), "-n", namespace, values=values)
        return Rendered([each for each in yaml.safe_load_all(text) if each])


class Rendered(list[Object]):
    """Objects, found by kind and name."""

    def one(self, kind: str, name: str | None = None) -> Object:
        """The only object of that kind, or of that kind and name."""
        (found,) = (
            each
            for each in self
            if each["kind"] == kind and name in (None, each["metadata"]["name"])
        )
        return found

    @property
    def kinds(self) -> set[str]:
        return {each["kind"] for each in self}

    def settings(self) -> str:
        """The file that the operator reads."""
        text: str = self.one("ConfigMap", f"{NAME}-settings")["data"]["settings.yaml"]
        return text

    def pod(self) -> Object:
        """The spec of the operator's pods."""
        spec: Object = self.one("Deployment")["spec"]["template"]["spec"]
        return spec


def manifests(helm: Helm) -> str:
    """deploy/operator.yaml: without the marks of helm, which is not there to heed them."""
    text = helm.run("template", NAME, str(CHART), "-n", NAMESPACE, values={"crds": {"keep": False}})
    text = re.sub(
        r"^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm)\n", "", text, flags=re.M
    )
    text = re.sub(r"^# Source: .*\n", "", text, flags=re.M)
    text = re.sub(r"\n\n+---", "\n---", text)
    return f"{_HEAD}{text.rstrip()}\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        helm = Helm(binaries.find(["helm"])["helm"], Path(home))
        MANIFESTS.write_text(manifests(helm), "utf-8")


if __name__ == "__main__":
    main()
