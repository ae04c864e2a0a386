"""The coordinator with real processes: preparing, the store, progress over HTTP, its end."""

import hashlib
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from cptjob_trainer import termination
from cptjob_trainer.config import digest
from cptjob_trainer.run import coordinator
from cptjob_trainer.training.progress import Progress

MakeJob = Callable[..., Any]


def _get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def _coordinate(made: Any, *more: str) -> Any:
    return made.start(
        "coordinator",
        *("--host", "127.0.0.1", "--store-port", "0", "--http-port", "0"),
        *("--address-directory", str(made.directory)),
        *("--prepare", "standin_worker:prepare_text"),
        *more,
    )


def test_it_prepares_serves_progress_and_ends_with_the_job(job: MakeJob) -> None:
    made = job("train")
    coordinator = _coordinate(made)
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    address = (made.directory / "http.address").read_text().strip()
    assert _get(address, "/healthz")[0] == 200
    assert _get(address, "/readyz")[0] == 200
    assert _get(address, "/nothing")[0] == 404
    assert json.loads(_get(address, "/progress")[1])["phase"] == "Loading"
    assert 'cptjob_phase{phase="Loading"} 1.0' in _get(address, "/metrics")[1]

    launcher.send_signal(signal.SIGTERM)
    assert made.end(launcher)[0] == 143
    assert made.end(coordinator)[0] == 0


def test_a_full_disk_keeps_no_warning_from_whoever_watches(job: MakeJob) -> None:
    made = job("train")
    # The file of warnings cannot be written.
    (made.directory / "warnings.txt").mkdir()
    _coordinate(made)
    made.wait_until((made.directory / "store.address").exists, "the store is there")
    address = (made.directory / "http.address").read_text().strip()
    assert json.loads(_get(address, "/warnings")[1]) == ["little data"]


def test_a_last_report_of_many_data_sets_fits_the_termination_message() -> None:
    metrics = {f"heldout/source-{number}": 1.0 for number in range(200)}
    last = Progress(current_step=9, metrics={**metrics, "heldout_domain_loss": 2.0})
    said = coordinator._short(last)
    assert len(said.encode()) <= termination.MAX_MESSAGE_BYTES
    kept = json.loads(said)["metrics"]
    assert kept["heldout_domain_loss"] == 2.0
    assert len(kept) > 20


def test_a_stop_after_the_end_of_the_job_changes_nothing(job: MakeJob) -> None:
    made = job("ok")
    coordinator = _coordinate(made)
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    made.wait_until(lambda: made.termination() is not None, "the coordinator has told the end")
    # It still serves the last of the progress.
    coordinator.send_signal(signal.SIGTERM)
    assert made.end(coordinator)[0] == 0
    assert made.termination().reason == "Complete"
    assert made.end(launcher)[0] == 0


def test_progress_of_rank_0_is_served(job: MakeJob) -> None:
    made = job("publish")
    coordinator = _coordinate(made)
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    made.wait_until(lambda: made.notes("published"), "rank 0 has published")
    address = (made.directory / "http.address").read_text().strip()
    made.wait_until(
        lambda: json.loads(_get(address, "/progress")[1])["currentStep"] == 5, "it is served"
    )
    assert "cptjob_step 5.0" in _get(address, "/metrics")[1]
    decided = json.loads(_get(address, "/progress")[1])["resolved"]
    training = made.config.training
    assert decided == {
        "maxLength": training.max_length,
        "batchSizePerDevice": training.batch_size_per_device,
        "globalBatchSize": training.global_batch_size,
        "warmupSteps": 2,
        "totalSteps": 250,
        "digest": digest(made.config, "model", "data"),
    }
    launcher.send_signal(signal.SIGTERM)
    assert made.end(launcher)[0] == 143
    assert made.end(coordinator)[0] == 0


def test_broken_data_ends_it_with_65_before_any_worker(job: MakeJob) -> None:
    made = job("bad")
    coordinator = _coordinate(made)
    code, errors = made.end(coordinator)
    assert code == 65
    assert errors.strip() == "error: two files are broken"
    assert made.termination().reason == "DataError"
    assert not (made.directory / "store.address").exists()


@pytest.mark.parametrize("asked", ["SIGTERM", "SIGHUP"])
def test_a_stop_between_preparing_and_the_store_is_heeded(asked: str, job: MakeJob) -> None:
    made = job(f"late-{asked}")
    assert made.end(_coordinate(made))[0] == 143
    assert not (made.directory / "store.address").exists()


def test_one_that_stays_serves_the_next_try_after_a_failure_that_may_pass(job: MakeJob) -> None:
    made = job("crash-1", max_restarts=0)
    coordinator = _coordinate(made, "--stay")

    def launch(attempt: int) -> Any:
        return made.start(
            *("launch", "--store", f"@{made.directory / 'store.address'}"),
            *("--entrypoint", "standin_worker:main", "--run-id", f"job-uid.{attempt}"),
        )

    assert made.end(launch(0))[0] == 137
    address = (made.directory / "http.address").read_text().strip()
    made.wait_until(
        lambda: json.loads(_get(address, "/progress")[1])["phase"] == "Failed", "the failure"
    )
    assert coordinator.poll() is None
    made.config.model_copy(update={"name": "ok"}).dump(made.config_path)
    assert made.end(launch(1))[0] == 0
    assert made.end(coordinator)[0] == 0
    assert made.termination().reason == "Complete"


def test_one_that_stays_ends_when_no_try_can_help(job: MakeJob) -> None:
    made = job("fail-65")
    coordinator = _coordinate(made, "--stay")
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    assert made.end(launcher)[0] == 65
    assert made.end(coordinator)[0] == 0
    assert made.termination().reason == "Ended"


def test_launchers_say_so_when_the_coordinator_is_gone(job: MakeJob) -> None:
    made = job("train")
    coordinator = _coordinate(made)
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    coordinator.kill()
    code, errors = made.end(launcher)
    assert code == 75, errors
    assert made.notes("saved") == ["saved.0.0", "saved.1.0"], "workers were asked to save"
    assert "the coordinator at 127.0.0.1:" in made.termination(1).message
    assert "Traceback" not in errors


def test_a_complete_output_ends_it_without_a_store(job: MakeJob) -> None:
    made = job("ok")
    _finish(made, b"{}", hashlib.sha256(b"{}").hexdigest())
    assert made.end(_coordinate(made))[0] == 0
    assert made.termination().reason == "AlreadyComplete"
    assert not (made.directory / "store.address").exists()


def test_an_output_whose_model_was_changed_is_not_complete(job: MakeJob) -> None:
    made = job("ok")
    _finish(made, b"[]", hashlib.sha256(b"{}").hexdigest())
    coordinator = _coordinate(made)
    launcher = made.start(
        *("launch", "--store", f"@{made.directory / 'store.address'}"),
        *("--entrypoint", "standin_worker:main"),
    )
    assert made.end(launcher)[0] == 0
    assert made.end(coordinator)[0] == 0
    assert made.notes("started") == ["started.0.0", "started.1.0"]
    assert made.termination().reason == "Complete"


def _finish(made: Any, model: bytes, sha256: str) -> None:
    """Leaves the result of the job, with one file of a model."""
    (made.output / "model").mkdir()
    (made.output / "model" / "config.json").write_bytes(model)
    files = {"model/config.json": {"bytes": len(model), "sha256": sha256}}
    result = {"digest": digest(made.config, "model", "data"), "files": files}
    (made.output / "manifest.json").write_text(json.dumps(result))


def test_two_launchers_cannot_hold_one_output(job: MakeJob) -> None:
    made = job("train")
    first = made.launch("--lock-output")
    made.wait_until(lambda: len(made.notes("training")) == 2, "workers train")
    code, errors = made.end(made.launch("--lock-output"))
    assert code == 75, errors
    assert f"in use by process {first.pid} on" in errors
    first.send_signal(signal.SIGTERM)
    assert made.end(first)[0] == 143
