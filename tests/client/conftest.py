"""A small model directory, data and a manifest, and the command line as a process."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MANIFEST = """\
apiVersion: training.cptjob.io/v1alpha1
kind: CPTJob
metadata:
  name: small
spec:
  model: {storageUri: "pvc://models/small"}
  datasets:
    - {name: law, storageUri: "pvc://data/law"}
  validation: {splitPercent: 0}
  training:
    epochs: 2
    maxLength: 100
    batchSizePerDevice: 2
    precision: Float32
  output: {storageUri: "pvc://results"}
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


def write_model(directory: Path) -> None:
    """Headers only: nothing here reads a weight."""
    directory.mkdir(parents=True)
    config = {"model_type": "llama", "max_position_embeddings": 512}
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 65536}
    (directory / "config.json").write_text(json.dumps(config | sizes))
    header = {
        "a": {"dtype": "F32", "shape": [100, 8], "data_offsets": [0, 3200]},
        "b": {"dtype": "F32", "shape": [200], "data_offsets": [3200, 4000]},
    }
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with volumes and `job.yaml`: 1000 weights, 8000 bytes of text."""
    write_model(tmp_path / "volumes" / "models" / "small")
    data = tmp_path / "volumes" / "data" / "law"
    data.mkdir(parents=True)
    line = json.dumps({"text": "x" * 987}) + "\n"
    assert len(line) == 1000
    (data / "a.jsonl").write_text(line * 8)
    (tmp_path / "job.yaml").write_text(MANIFEST)
    return tmp_path


@pytest.fixture
def cptjob(place: Path) -> Cli:
    """Runs `cptjob ARGUMENTS` in `place`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cptjob", *arguments],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=120,
            env={name: value for name, value in os.environ.items() if name != "CPTJOB_DEBUG"},
        )

    return run
