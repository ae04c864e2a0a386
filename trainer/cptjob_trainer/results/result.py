"""What a run leaves: the result, and the manifest that tells of it."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cptjob_trainer import failpoints, swap
from cptjob_trainer.checkpoint.checkpoint_manifest import software
from cptjob_trainer.checkpoint.state import LoopState
from cptjob_trainer.config import TrainerConfig, digest
from cptjob_trainer.data.prepared import Prepared
from cptjob_trainer.disk import file_digest, sync_directory, write_json
from cptjob_trainer.results import output
from cptjob_trainer.results.result_weights import whole
from cptjob_trainer.training.evaluate import HeldOut
from cptjob_trainer.training.metrics import finite

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's loss on this text is not a finite number"


def publish(
    config: TrainerConfig,
    prepared: Prepared,
    weights: dict[str, torch.Tensor],
    state: LoopState,
    base: HeldOut,
    rank: int,
    world: int,
) -> None:
    """Write model, adapter, report and manifest, the manifest last. Collective.

    weights: all parameters, trained or not, by their transformers names, Tensor or DTensor.
    """
    out, model_dir = config.paths.output, Path(config.model.path)
    lora = config.training.lora if config.training.method == "LoRA" else None
    scale = None if lora is None else lora.alpha / lora.rank
    if rank == 0:
        withdraw(out, adapter=lora is not None)
    output.publish_model(out, model_dir, weights, lora_scale=scale, rank=rank)
    if lora is not None:
        adapter = {n: whole(tensor) for n, tensor in weights.items() if ".lora_" in n}
        if rank == 0:
            output.publish_adapter(
                out,
                adapter,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                base=str(model_dir.absolute()),
            )
    if rank == 0:
        value = manifest(config, prepared, state, base, world)
        _report(out, value)
        write_manifest(out, value)


def withdraw(out: Path, adapter: bool) -> None:
    """Before a new result is put in place: what is there is no longer complete.

    The manifest goes first, so that no crash can leave it beside another model. `adapter` says
    whether the new result has one; otherwise an older one goes too.
    """
    with swap.writing(out):
        (out / "manifest.json").unlink(missing_ok=True)
        sync_directory(out)
        if not adapter and (out / "adapter").exists():
            shutil.rmtree(out / "adapter")


def _report(out: Path, value: dict[str, Any]) -> None:
    """The page is a view of what is written anyway: a trained model is not thrown away for it."""
    from cptjob_trainer.results import report

    failpoints.hit("output.report")
    try:
        report.write_report(out, value)
    except Exception:
        log.exception("report.html could not be written; `cptjob report %s` tries again", out)


def manifest(
    config: TrainerConfig, prepared: Prepared, state: LoopState, base: HeldOut, world: int
) -> dict[str, Any]:
    """What was made, from what, with what: everything but the files, which are digested last."""
    bases = {f"heldout_{role.lower()}_loss_base": loss for role, loss in base.by_role.items()}
    metrics = finite(bases | state.heldout)
    given = {dataset.name: dataset for dataset in config.datasets}
    return {
        "version": 1,
        "jobName": config.name,
        "task": config.task,
        "digest": digest(config, prepared.model_fingerprint, prepared.data_fingerprint),
        "parentModel": {"uri": config.model.uri, "fingerprint": prepared.model_fingerprint},
        "data": {
            "fingerprint": prepared.data_fingerprint,
            "prepared": prepared.digest,
            "splitPercent": config.validation.split_percent,
            "sources": [
                {
                    "name": source.name,
                    "version": given[source.name].version,
                    "uri": given[source.name].uri,
                    "role": source.role,
                    "documents": source.documents,
                    "tokens": source.tokens,
                    "rows": source.rows(),
                    "weight": given[source.name].weight,
                    "quota": quota,
                }
                for source, quota in zip(prepared.sources, prepared.quotas, strict=True)
            ],
        },
        "settings": config.training.model_dump(mode="json", by_alias=True),
        "packed": prepared.packed,
        "totalRows": prepared.total_rows,
        "totalSteps": prepared.total_steps,
        "steps": state.step,
        "tokens": state.tokens,
        "tokensBySource": state.tokens_by_source,
        "skippedSteps": state.skipped,
        "trainingSeconds": round(state.training_seconds, 3),
        "evaluationSeconds": round(state.evaluation_seconds, 3),
        "metrics": metrics,
        "notFinite": {name: _NOT_FINITE for name, value in metrics.items() if value is None},
        "completionTime": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": world,
        "software": software(),
    }


def write_manifest(out: Path, value: Mapping[str, Any]) -> Path:
    """Write `OUT/manifest.json`, last of all: `value`, and each output file's size and SHA-256."""
    path = out / "manifest.json"
    with swap.writing(path):
        files = {
            str(file.relative_to(out)): asdict(file_digest(file))
            for folder in ("adapter", "model")
            for file in sorted((out / folder).rglob("*"))
            if file.is_file()
        }
        failpoints.hit("output.manifest")
        temporary = out / ".manifest.json.tmp"
        temporary.unlink(missing_ok=True)
        write_json(temporary, {**value, "files": files})
        temporary.replace(path)
        sync_directory(out)
    return path
