"""The operator as a process of its own, as a test runs it."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testplane.plane import ControlPlane
from testplane.ports import free_ports

#: Seconds: short, so that a test need not wait long for another leader.
LEASE_SECONDS = 3


class RunningOperator:
    """`python -m cptjob_operator` for the jobs of one namespace; its lease is there too.

    identity: two operators with the same one are one that was started anew.
    program: what Python is to run in place of it.
    """

    def __init__(
        self,
        plane: ControlPlane,
        folder: Path,
        namespace: str,
        *,
        kubeconfig: Path | None = None,
        identity: str = "one",
        settings: dict[str, Any] | None = None,
        program: Sequence[str] = ("-m", "cptjob_operator"),
    ) -> None:
        self.plane, self.folder, self.namespace = plane, folder, namespace
        self.identity, self._program = identity, program
        self._kubeconfig = kubeconfig or plane.kubeconfig
        self.metrics_port, self._probe_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"operator-{identity}.log"
        self._settings = folder / f"settings-{identity}.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self._settings.write_text(json.dumps(self._document(settings or {})))

    def _document(self, more: dict[str, Any]) -> dict[str, Any]:
        return {
            "watchedNamespaces": [self.namespace],
            "pools": {"pool-a": {}},
            "jobs": {"image": "test.invalid/trainer:1"},
            "leader": {"leaseSeconds": LEASE_SECONDS, "renewSeconds": 1.0},
            "serving": {"metricsPort": self.metrics_port, "probePort": self._probe_port},
            **more,
        }

    def start(self) -> "RunningOperator":
        """Starts it, again if it has ended; does not wait."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, *self._program),
                    *("--settings", str(self._settings), "--namespace", self.namespace),
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "KUBECONFIG": str(self._kubeconfig),
                    "POD_NAME": self.identity,
                    "POD_UID": self.identity,
                },
            )
        return self

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> int:
        """Asks it to end. Returns its exit code."""
        self._signal(signal.SIGTERM)
        assert self._process is not None
        return self._process.wait(timeout=120)

    @property
    def died(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    # --- what it says ---

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log, of all its starts. Raises when a line is not one JSON object."""
        found = [json.loads(line) for line in self.log.read_text().split("\n") if line]
        assert all(isinstance(line, dict) for line in found), self.log
        return found

    def wait_ready(self) -> "RunningOperator":
        """Returns when it has seen what there is and watches everything."""
        self.plane.wait(lambda: self._alive() and self.get("readyz")[0] == 200, "the operator")
        return self

    def wait_leading(self) -> "RunningOperator":
        self.wait_ready()
        self.plane.wait(lambda: self._alive() and self.figure("cptjob_leader") == 1, "it to lead")
        return self

    def wait_quiet(self) -> None:
        """Returns when it leads, has looked at every job, and no pass is due or under way."""

        self.plane.wait(lambda: self._alive() and self.quiet, "the operator to be done")

    @property
    def quiet(self) -> bool:
        figures = self.figures()
        return (
            figures.get("cptjob_leader") == 1
            and self.passes() > 0
            and figures["cptjob_queue_depth"] == 0
            and figures["cptjob_passes_active"] == 0
        )

    def passes(self) -> float:
        """Passes since its start."""
        name = "cptjob_reconcile_duration_seconds_count"
        return sum(value for key, value in self.figures().items() if key.startswith(name))

    def figure(self, name: str) -> float | None:
        return self.figures().get(name)

    def figures(self) -> dict[str, float]:
        """Everything at /metrics."""
        code, text = self.get("metrics", self.metrics_port)
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in ("", "#")]
        return {name: float(value) for name, value in lines} if code == 200 else {}

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Status code and text; 0 when nothing answers."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port or self._probe_port}/{path}", timeout=5
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def _alive(self) -> bool:
        code = self._process.poll() if self._process is not None else None
        assert code is None, f"the operator ended ({code}):\n{self.log.read_text()[-3000:]}"
        return True
