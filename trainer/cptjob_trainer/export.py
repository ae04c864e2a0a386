"""Writes a checkpoint as a model directory: `python -m cptjob_trainer.export --config C --step N`."""

import argparse
from pathlib import Path

from cptjob_trainer import termination
from cptjob_trainer.config import AcceptedConfig


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process as its error says."""
    parser = argparse.ArgumentParser(prog="cptjob_trainer.export", description=__doc__)
    parser.add_argument("--config", required=True, help="AcceptedConfig as JSON")
    parser.add_argument("--step", required=True, type=int, help="step of the checkpoint")
    parser.add_argument("--to", required=True, type=Path, help="directory to make")
    options = parser.parse_args(arguments)
    with termination.guard():
        _export(AcceptedConfig.load(options.config), options.step, options.to)


def _export(config: AcceptedConfig, step: int, target: Path) -> None:
    from cptjob_trainer import output  # imports torch

    lora = config.training.lora if config.training.method == "LoRA" else None
    published = output.export(
        config.paths.output / "checkpoints",
        step,
        config.model.path,
        target,
        lora_scale=None if lora is None else lora.alpha / lora.rank,
    )
    print(f"the model of step {step} is in {published.path}")


if __name__ == "__main__":
    main()
