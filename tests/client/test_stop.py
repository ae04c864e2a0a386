"""A command that is stopped in its work ends with all of its processes, and without a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
MANIFEST = """\
apiVersion: training.cptjob.io/v1alpha1
kind: CPTJob
metadata: {{name: large}}
spec:
  task: CausalLM
  model: {{storageUri: "file://{model}"}}
  datasets: [{{name: law, storageUri: "file://{data}"}}]
"""


@pytest.fixture(name="preparing")
def start(tmp_path: Path) -> subprocess.Popen[str]:
    """`cptjob prepare` in the midst of much text."""
    data = tmp_path / "data"
    data.mkdir()
    words = " ".join(f"word{number}" for number in range(150))
    with (data / "a.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"text": f"{number} {words}"}) + "\n" for number in range(60_000)
        )
    manifest = tmp_path / "job.yaml"
    manifest.write_text(MANIFEST.format(model=ROOT / "volumes" / "models" / "tiny", data=data))
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "cptjob", "prepare", str(manifest), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _wait(lambda: any((output / "prepared").glob("shards/*")), "tokenising to begin")
    return process


def _wait(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def _session(leader: int) -> list[int]:
    """Processes that were started in the session of that process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_ctrl_c_ends_it_in_one_line(preparing: subprocess.Popen[str]) -> None:
    os.killpg(preparing.pid, signal.SIGINT)
    said, _ = preparing.communicate(timeout=SECONDS)
    assert preparing.returncode == 143, said
    assert "Traceback" not in said, said
    _wait(lambda: not _session(preparing.pid), "its processes to end")


def test_nothing_outlives_a_client_that_is_killed(preparing: subprocess.Popen[str]) -> None:
    assert len(_session(preparing.pid)) > 1
    preparing.kill()
    preparing.communicate(timeout=SECONDS)
    _wait(lambda: not _session(preparing.pid), "its processes to end")
