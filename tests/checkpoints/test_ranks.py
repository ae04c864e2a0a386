"""Several ranks save together, and another number of ranks loads it."""

import json
import resource
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Small(torch.nn.Module):
    """Rows that two ranks cannot halve, one of a single row, and a tied pair of layers' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(6, 3)
        self.two = torch.nn.Linear(3, 1, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) * self.scale.sum()


def build(world: int, seed: int) -> tuple[Small, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Small()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: Small, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).reshape(2, 6)).sum().backward()
    optimizer.step()


def tensors_of(model: Small, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def trained_and_saved(lab: Any, rank: int, world: int) -> dict[str, str]:
    model, optimizer = build(world, seed=1)
    step(model, optimizer)
    checkpoints = lab.make(rank=rank, world=world)
    checkpoints.open()
    checkpoints.save(1, tensors_of(model, optimizer), {"step": 1})
    return lab.bits(whole(tensors_of(model, optimizer)))


def loaded(lab: Any, rank: int, world: int) -> dict[str, str]:
    model, optimizer = build(world, seed=2)
    step(model, optimizer)
    checkpoints = lab.make(rank=rank, world=world)
    checkpoints.load(checkpoints.open(), tensors_of(model, optimizer))
    return lab.bits(whole(tensors_of(model, optimizer)))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (2, 3), (3, 2)])
def test_sharded_parameters_and_moments_come_back_at_any_world_size(
    lab: Any, before: int, after: int
) -> None:
    saved = lab.gloo(before, lambda rank: trained_and_saved(lab, rank, before))
    read = lab.gloo(after, lambda rank: loaded(lab, rank, after))
    for outcome in saved + read:
        assert outcome.error is None, outcome
        assert outcome.value == saved[0].value


def test_each_rank_writes_its_shard_and_what_all_hold_is_written_once(lab: Any) -> None:
    lab.gloo(2, lambda rank: trained_and_saved(lab, rank, 2))
    manifest = json.loads((lab.directory / "step-1.1" / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert manifest["world"] == 2
    chunks = manifest["tensors"]["model.one.weight"]["chunks"]
    assert [(c["offsets"], c["sizes"], c["key"]) for c in chunks] == [
        ([0, 0], [2, 6], "model.one.weight@0,0"),
        ([2, 0], [1, 6], "model.one.weight@2,0"),
    ]
    assert len(manifest["tensors"]["optimizer.one.weight.step"]["chunks"]) == 1
    # The single row is with the first rank; nothing empty is written by the other.
    assert len(manifest["tensors"]["model.two.weight"]["chunks"]) == 1


def test_a_fault_in_one_rank_is_the_same_error_in_all(lab: Any) -> None:
    def save(rank: int) -> None:
        checkpoints = lab.make(rank=rank, world=2)
        checkpoints.open()
        bad = {"note": "text"} if rank == 1 else {}
        checkpoints.save(1, {**lab.values(1), **bad}, {})

    first, second = lab.gloo(2, save)
    assert first == second
    assert first.error == "CheckpointError"
    assert "note is a str, not a tensor" in first.message


def test_a_full_disk_in_one_rank_stops_all_and_leaves_no_half_checkpoint(lab: Any) -> None:
    def save(rank: int) -> None:
        checkpoints = lab.make(rank=rank, world=2)
        checkpoints.open()
        checkpoints.save(1, lab.values(1), {"step": 1})
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        large = {f"large{n}": torch.zeros(5000) for n in range(4)}
        checkpoints.save(2, large, {"step": 2})

    first, second = lab.gloo(2, save)
    assert first == second
    assert first.error == "StorageFullError"
    assert "no room to save step-2.1" in first.message
    assert lab.names() == ["step-1.1"]


def test_another_lineage_is_refused_in_all_ranks(lab: Any) -> None:
    lab.train(1)
    outcomes = lab.gloo(
        2, lambda rank: lab.make(rank=rank, world=2, lineage={"model": "m2", "seed": 0}).open()
    )
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].error == "MismatchError"


def test_one_broken_file_of_one_rank_is_seen_by_all(lab: Any) -> None:
    def two_steps(rank: int) -> None:
        lab.train(2, rank=rank, world=2)

    lab.gloo(2, two_steps)
    file = lab.directory / "step-2.1" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x99")

    def reopened(rank: int) -> list[Any]:
        checkpoints = lab.make(rank=rank, world=2)
        return [checkpoints.open().step, checkpoints.warnings]

    first, second = lab.gloo(2, reopened)
    assert first == second
    assert first.value[0] == 1
    assert "rank-00001.safetensors does not have the digest" in first.value[1][0]
