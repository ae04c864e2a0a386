"""Reports of runs that still go on, were stopped, or left broken files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cptjob_trainer.errors import MissingInputError, OutputError
from cptjob_trainer.locks import OutputLock
from cptjob_trainer.results.report import write_report


def test_a_stopped_run_is_told_from_what_it_left(run: Any, page: Any) -> None:
    run.done = 120
    out = run.write()
    (out / ".lock").touch()
    text = page(write_report(out)).text
    for words in (
        "small",
        "Stopped",
        "Continued pre-training of pvc://models/small.",
        "The same command continues it.",
        "120 of 200\n60 %",
        "4.000 → 3.750\n−0.2500 (better)",
        "method\nFull",
        "Known once a checkpoint is saved.",
    ):
        assert words in text


def test_a_run_whose_output_is_locked_still_goes_on(run: Any, page: Any) -> None:
    run.done = 120
    out = run.write()
    with OutputLock(out, "uid"):
        assert "Running" in page(write_report(out)).text
    assert "Running" not in page(write_report(out)).text


def test_looking_at_an_output_leaves_its_lock_free(run: Any) -> None:
    out = run.write()
    (out / ".lock").touch()
    write_report(out)
    with OutputLock(out, "uid"):
        pass


def test_a_run_without_a_lock_file_is_only_said_to_be_incomplete(run: Any, page: Any) -> None:
    run.done = 120
    assert "Not complete" in page(write_report(run.write())).text


def test_before_the_first_evaluation_the_base_model_is_shown(run: Any, page: Any) -> None:
    run.done = 20
    text = page(write_report(run.write())).text
    assert "Held-out loss, domain text\n4.000\nbase model, perplexity 54.6" in text


def test_settings_and_versions_come_from_a_checkpoint_where_there_is_no_other_record(
    run: Any, page: Any
) -> None:
    out = run.write()
    (out / "logs" / "small-20260102-030405" / "config.json").unlink()
    checkpoint = out / "checkpoints" / "step-100.1"
    checkpoint.mkdir(parents=True)
    value = {"lineage": {"model": "f", "training.seed": 41}, "software": {"torch": "2.15.0"}}
    (checkpoint / "manifest.json").write_text(json.dumps(value))
    text = page(write_report(out)).text
    assert "seed\n41" in text
    assert "torch\n2.15.0" in text


def test_a_metrics_file_cut_in_the_middle_of_a_line_is_read_up_to_there(
    run: Any, page: Any
) -> None:
    path = run.write() / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'{"step": 131,') + 40])
    assert "130 of 200" in page(write_report(run.out)).text


def test_lines_that_make_no_sense_are_left_out(run: Any, page: Any) -> None:
    path = run.write() / "metrics.jsonl"
    odd = [
        b"\x00\x00\x00\xff",
        b"[]",
        b'{"step": "x"}',
        b'{"step": 200, "evaluation": null}',
        b'{"step": 201, "loss": "low", "tokensBySource": 3, "gradNorm": {}, "padding": 1e999}',
    ]
    path.write_bytes(path.read_bytes() + b"\n".join(odd))
    assert "201 of 200" in page(write_report(run.out)).text


def test_the_manifest_of_an_earlier_job_does_not_speak_for_the_run_that_follows_it(
    run: Any, page: Any
) -> None:
    run.done = 120
    out = run.write()
    (out / "manifest.json").write_text(json.dumps({"jobName": "earlier", "steps": 77}))
    text = page(write_report(out)).text
    assert "earlier" not in text
    assert "120 of 200" in text


def test_a_manifest_without_metrics_still_tells_the_result(run: Any, page: Any) -> None:
    out = run.write()
    (out / "manifest.json").write_text(json.dumps(run.manifest()))
    (out / "metrics.jsonl").unlink()
    found = page(write_report(out))
    assert "4.000 → 3.500" in found.text
    assert "200 of 200" in found.text
    assert "614,400" in found.text
    assert found.drawings == []


def test_a_run_without_a_step_says_so(run: Any, page: Any) -> None:
    run.done = 0
    assert "No step is done yet" in page(write_report(run.write())).text


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="give the output folder of a run"):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_a_report_that_cannot_be_written_leaves_the_earlier_one_and_nothing_else(run: Any) -> None:
    out = run.write()
    # Root may write anywhere, but nobody replaces a folder by a file.
    (out / "report.html").mkdir()
    (out / "report.html" / "kept").touch()
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputError, match=r"report\.html: the report cannot be written"):
        write_report(out)
    assert sorted(out.rglob("*")) == before


def test_the_command_ends_with_one_line_and_the_exit_code_of_a_missing_input(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "cptjob_trainer.results.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 66
    assert done.stderr.startswith(f"error: {tmp_path}: neither metrics.jsonl nor manifest.json")
    assert done.stderr.count("\n") == 1
