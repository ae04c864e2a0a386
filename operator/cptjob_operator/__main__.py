"""python -m cptjob_operator --settings FILE"""

import argparse
import asyncio
import gc
import logging
import sys
from pathlib import Path

import cptjob_operator.lean  # noqa: F401  (first)
from cptjob_operator import logs, settings
from cptjob_operator.edge.login import LoginError
from cptjob_operator.plan.rules import plan
from cptjob_operator.run import Operator
from cptjob_trainer.errors import CPTJobError

log = logging.getLogger("cptjob_operator")


def main(arguments: list[str] | None = None) -> int:
    """Runs the operator until it is asked to end. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="cptjob-operator", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="YAML file of the platform")
    parser.add_argument("--namespace", default="", help="namespace of the lease (default: own)")
    asked = parser.parse_args(arguments)
    try:
        known = settings.load(asked.settings)
    except CPTJobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    logs.configure(known.serving.log_level)
    # What was imported stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    try:
        asyncio.run(_run(known, asked.namespace))
    except LoginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    except Exception:
        log.exception("the operator ends; it is to be started again")
        return 1
    return 0


async def _run(known: settings.Settings, namespace: str) -> None:
    await Operator(known, plan, namespace).run()


if __name__ == "__main__":
    sys.exit(main())
