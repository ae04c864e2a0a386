"""One rank of `test_sharded.py`: trains as told on the command line and prints what it lost.

python sharded_rank.py '{"model": ..., "config": ..., ...}'      with RANK, WORLD_SIZE, MASTER_* set
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.model import pretrained
from cptjob_trainer.training.optimizer import checkpoint_tensors

spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
helpers = importlib.util.module_from_spec(spec)
sys.modules["helpers"] = helpers
spec.loader.exec_module(helpers)


def refuse(*_: object) -> None:
    raise AssertionError("only the first rank may load the whole model")


def main(text: str) -> None:
    """`text`: the task as JSON; RANK, WORLD_SIZE and MASTER_* are set."""
    task = json.loads(text)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    if rank > 0:
        pretrained.load = refuse
    config = TrainerConfig.load(task["config"])
    rows = helpers.random_rows(*task["rows"])
    trainer = helpers.assemble(config, rows, task["total_steps"], task["packed"], rank, world)
    resume = trainer.checkpoints.open()
    first = 0
    if resume is not None:
        trainer.checkpoints.load(resume, checkpoint_tensors(trainer.model, trainer.optimizer))
        first = resume.step
    losses = []
    for step in range(first, task["until"]):
        trainer.state.step = step
        part = trainer.batcher.step(step)
        losses.append(trainer.step(part, trainer._agree(part).targets).loss)
    trainer.state.step = task["until"]
    trainer.save()
    heldout = trainer.evaluator.run(trainer.model).by_role
    if rank == 0:
        value = {"losses": losses, "heldout": heldout, "first": first}
        Path(task["result"]).write_text(json.dumps(value))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
