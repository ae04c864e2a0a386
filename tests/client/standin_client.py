"""`cptjob` whose jobs run the stand-in worker of tests/run instead of the training."""

import dataclasses
from typing import Any

from torchx.specs import AppDef

from cptjob import cli, local

WORDS = {
    local.COORDINATOR: ["--prepare", "standin_worker:prepare_text"],
    local.TRAINER: ["--entrypoint", "standin_worker:main"],
}
real_app = local.app


def app(*arguments: Any) -> AppDef:
    made = real_app(*arguments)
    roles = [dataclasses.replace(role, args=[*role.args, *WORDS[role.name]]) for role in made.roles]
    return dataclasses.replace(made, roles=roles)


if __name__ == "__main__":
    local.app = app
    cli.main()
