"""One rank of `test_sharded.py`: trains as told on the command line and prints what it lost.

python sharded_rank.py '{"model": ..., "config": ..., ...}'      with RANK, WORLD_SIZE, MASTER_* set
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.loop import checkpoint_tensors

spec = importlib.util.spec_from_file_location("helpers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
helpers = importlib.util.module_from_spec(spec)
sys.modules["helpers"] = helpers
spec.loader.exec_module(helpers)

task = json.loads(sys.argv[1])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if world > 1:
    dist.init_process_group("gloo")
config = TrainerConfig.load(task["config"])
trainer = helpers.assemble(
    config,
    helpers.random_rows(*task["rows"]),
    task["total_steps"],
    task["packed"],
    rank,
    world,
)
resume = trainer.checkpoints.open()
first = 0
if resume is not None:
    trainer.checkpoints.load(resume, checkpoint_tensors(trainer.model, trainer.optimizer))
    first = resume.step
losses = []
for step in range(first, task["until"]):
    trainer.state.step = step
    rows = trainer.batcher.step(step)
    losses.append(trainer.step(rows, trainer._agree(rows).targets).loss)
trainer.state.step = task["until"]
trainer.save()
heldout = trainer.evaluator.run(trainer.model).by_role
if rank == 0:
    print(json.dumps({"losses": losses, "heldout": heldout, "first": first}))
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
torch.set_num_threads(1)
