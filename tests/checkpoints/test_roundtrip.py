"""What is saved comes back, bit for bit, in one process and in a form that others can read."""

import ast
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cptjob_trainer
from cptjob_trainer.checkpoint import dcp_storage
from cptjob_trainer.errors import CheckpointError, ConfigError, Stopped

PACKAGE = Path(cptjob_trainer.__path__[0])


def test_every_tensor_comes_back_bit_for_bit_with_the_loop_state(lab: Any) -> None:
    state = {"step": 3, "seconds": 0.1 + 0.2, "skipped": [1, 2], "name": "naïve"}
    checkpoints = lab.make()
    assert checkpoints.open() is None
    saved = checkpoints.save(3, lab.values(3), state)

    again = lab.make()
    resume = again.open()
    assert (resume.step, resume.path, resume.loop_state) == (3, saved.path, state)
    tensors = lab.empty()
    again.load(resume, tensors)
    assert lab.bits(tensors) == lab.bits(lab.values(3))
    assert again.warnings == []


def test_a_parameter_that_needs_gradients_is_loaded_in_place(lab: Any) -> None:
    layer = torch.nn.Linear(4, 2)
    wanted = {name: value.detach().clone() for name, value in layer.named_parameters()}
    checkpoints = lab.make()
    checkpoints.open()
    checkpoints.save(1, dict(layer.named_parameters()), {})
    torch.nn.init.zeros_(layer.weight)
    checkpoints.load(lab.make().open(), dict(layer.named_parameters()))
    assert lab.bits(dict(layer.named_parameters())) == lab.bits(wanted)


def test_safetensors_alone_reads_the_files_and_sha256sum_checks_them(lab: Any) -> None:
    lab.train(1)
    path = lab.directory / "step-1.1"
    code = (
        "import safetensors.torch, sys; "
        "print(sorted(safetensors.torch.load_file(sys.argv[1])['model.half'].shape))"
    )
    file = path / "rank-00000.safetensors"
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.stdout == "[9]\n", done.stderr
    manifest = json.loads((path / "manifest.json").read_bytes())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["files"] == {file.name: {"bytes": file.stat().st_size, "sha256": sha256}}


def test_the_same_tensors_give_the_same_bytes(lab: Any) -> None:
    checkpoints = lab.make()
    checkpoints.open()
    files = [
        checkpoints.save(step, dict(reversed(tensors.items())), {}).path / "rank-00000.safetensors"
        for step, tensors in ((1, lab.values(7)), (2, lab.values(7)))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_step_that_is_saved_already_is_not_written_again(lab: Any) -> None:
    lab.train(2)
    checkpoints = lab.make()
    resume = checkpoints.open()
    assert checkpoints.save(2, lab.values(2), {"step": 2}).path == resume.path
    assert lab.names() == ["step-1.1", "step-2.1"]


def test_what_is_not_a_tensor_is_refused_by_name(lab: Any) -> None:
    checkpoints = lab.make()
    checkpoints.open()
    with pytest.raises(CheckpointError, match=r"optimizer\.groups is a list, not a tensor"):
        checkpoints.save(1, {**lab.values(1), "optimizer.groups": [1]}, {})
    assert lab.names() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.half"), "model.half is not part of this run"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is missing"),
        (
            lambda t: t.update({"model.weight": torch.zeros(7, 5)}),
            r"model.weight is F32 \[5, 7\] there and F32 \[7, 5\] in this run",
        ),
        (
            lambda t: t.update({"model.weight": torch.zeros(5, 7).half()}),
            r"model.weight is F32 \[5, 7\] there and F16 \[5, 7\] in this run",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(lab: Any, change: Any, message: str) -> None:
    lab.train(1)
    checkpoints = lab.make()
    resume = checkpoints.open()
    tensors = lab.empty()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(resume, tensors)


@pytest.mark.parametrize("keep_last", [0, -1, 5001])
def test_keep_last_is_one_to_five_thousand(lab: Any, keep_last: int) -> None:
    with pytest.raises(ConfigError, match=f"keepLast is {keep_last}"):
        lab.make(keep_last=keep_last)


def test_nothing_is_pickled_or_unpickled(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in [
        *((pickle, name) for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")),
        *((torch, name) for name in ("load", "save")),
        *((torch.distributed.distributed_c10d, name) for name in ("_pickler", "_unpickler")),
    ]:
        monkeypatch.setattr(module, name, refuse)

    def two_ranks(rank: int) -> list[int]:
        return lab.train(2, rank=rank, world=2), lab.train(3, rank=rank, world=2)

    for outcome in lab.gloo(2, two_ranks):
        assert outcome.value == [[1, 2], [3]], outcome
    assert lab.train(4) == [4]


def test_a_folder_holds_only_json_and_safetensors(lab: Any) -> None:
    lab.train(2)
    for path in (path for path in lab.directory.rglob("*") if path.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            head = path.read_bytes()
            length = int.from_bytes(head[:8], "little")
            assert isinstance(json.loads(head[8 : 8 + length]), dict), path


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_code_uses_no_pickle(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    } | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {"torch.load", "torch.save"} & used
    assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & imported
    assert not any("object" in name for name in used if name.startswith("dist."))


def test_a_stop_in_the_middle_of_loading_is_a_stop_and_no_broken_checkpoint(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(1)
    checkpoints = lab.make()
    resume = checkpoints.open()

    def told(*_: Any) -> None:
        raise Stopped("stopped")

    monkeypatch.setattr(dcp_storage, "_fill", told)
    with pytest.raises(Stopped):
        checkpoints.load(resume, lab.empty())
