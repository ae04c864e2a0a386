"""What is wrong with an export is said before torch is imported, with the code of its kind."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cptjob_trainer.errors import DataError, MismatchError, MissingInputError, OutputError
from cptjob_trainer.results import export


@pytest.fixture
def saved(lab: Any) -> Path:
    """A folder with checkpoints of steps 2 and 4."""
    checkpoints = lab.make()
    checkpoints.open()
    for step in (2, 4):
        checkpoints.save(step, {"model.a": torch.ones(3)}, {"step": step})
    directory: Path = lab.directory
    return directory


def test_the_checkpoint_of_a_step_is_found(saved: Path) -> None:
    assert export.find(saved, 4) == saved / "step-4.1"
    assert export.read_whole(saved / "step-4.1")["step"] == 4


def test_a_step_or_folder_that_is_not_there_is_missing(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no checkpoint of step 3; it has: 2, 4"):
        export.find(saved, 3)
    with pytest.raises(MissingInputError, match="there is no such folder; give the --output"):
        export.find(tmp_path / "lost", 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("manifest.json", "manifest.json is not JSON"),
        ("rank-00000.safetensors", "rank-00000.safetensors has 0 bytes"),
    ],
)
def test_a_broken_checkpoint_is_broken_data(saved: Path, name: str, reason: str) -> None:
    (saved / "step-4.1" / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"step-4\.1 is broken: {reason}.*; take another --step"):
        export.read_whole(export.find(saved, 4))


def test_a_target_that_cannot_be_made_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file exists; remove it, or give another folder with"):
        export.check_target(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot write .*; give another folder with --to"):
        export.check_target(tmp_path / "file" / "below")
    export.check_target(tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_finding_out_needs_no_torch() -> None:
    program = "import sys, cptjob_trainer.results.export; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_an_adapter_is_not_put_on_another_base_nor_scaled_otherwise(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"rank": 4, "alpha": 32.0}
    kept = {"model": "m", "training.method": "LoRA", "training.lora": adapter, "training.seed": 1}
    checkpoints = lab.make(lineage=kept)
    checkpoints.open()
    checkpoints.save(4, {"model.a": torch.ones(3)}, {"step": 4})
    found = SimpleNamespace(fingerprint="m")
    monkeypatch.setattr(export.modeldir, "check_model", lambda path: found)

    def config(**changes: Any) -> Any:
        dumped = {"method": "LoRA", "lora": adapter, "seed": 2} | changes
        training = SimpleNamespace(method="LoRA", model_dump=lambda **_: dumped)
        model = SimpleNamespace(path=None, uri="pvc://models/new")
        validation = SimpleNamespace(datasets=())
        return SimpleNamespace(training=training, model=model, datasets=(), validation=validation)

    checkpoint = export.find(lab.directory, 4)
    export.check_run(checkpoint, config())  # another seed changes no model
    with pytest.raises(MismatchError, match=r"lora\.alpha is 32\.0 in the checkpoint and 320\.0"):
        export.check_run(checkpoint, config(lora=adapter | {"alpha": 320.0}))
    found.fingerprint = "n"
    with pytest.raises(MismatchError, match=r"model is .*pvc://models/new"):
        export.check_run(checkpoint, config())
