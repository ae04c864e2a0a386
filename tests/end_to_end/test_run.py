"""What a person gets from `cptjob run`: the result, going on, refusals and deaths."""

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MakeJob = Callable[..., Any]
Done = tuple[Any, str, list[dict[str, Any]]]
Stopped = tuple[Any, int, str]

STEPS = 12
COMPLETE = "complete already"


def test_a_job_leaves_all_that_was_promised(done: Done) -> None:
    job, output, seen = done
    assert job.checkpoints() == [8, 12]
    assert job.result()["steps"] == STEPS
    assert [line["step"] for line in job.metrics()] == list(range(1, STEPS + 1))
    assert list((job.output / "tensorboard").glob("events.out.tfevents.*"))
    assert "<html" in (job.output / "report.html").read_text()
    assert not (job.output / "adapter").exists()
    for role in ("domain", "general"):
        metrics = job.result()["metrics"]
        before, after = metrics[f"heldout_{role}_loss_base"], metrics[f"heldout_{role}_loss"]
        assert after < before
        assert f"{before:.4f} before, {after:.4f} after" in output
    # A step of so small a model is over too soon to be seen by itself; a save in between is not.
    begun = [progress for progress in seen if progress["currentStep"] > 0]
    steps = [progress["currentStep"] for progress in begun]
    assert steps, "nobody served /progress while it trained"
    assert steps[0] < STEPS, "it was told in the end only"
    assert steps == sorted(steps)
    assert {progress["totalSteps"] for progress in begun} == {STEPS}


def test_the_model_loads_and_writes_text(done: Done) -> None:
    folder = done[0].output / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("The", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, min_new_tokens=3).shape[1] > 3


def test_the_checkpoint_of_a_step_becomes_a_model_that_loads(done: Done) -> None:
    job = done[0]
    code, output, errors = job.end(job.start(2, "export", "--step", "8"))
    assert (code, errors) == (0, "")
    folder = job.output / "model-step-8"
    assert output == f"the model of step 8 is in {folder}\n"
    before, after = (
        AutoModelForCausalLM.from_pretrained(each) for each in (folder, job.output / "model")
    )
    assert before.lm_head.weight.shape == after.lm_head.weight.shape
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_the_same_command_again_leaves_everything_as_it_is(done: Done) -> None:
    job, first, _ = done
    code, output, errors = job.run()
    assert code == 0, errors
    assert COMPLETE in output
    assert output.endswith(first)


def test_a_model_that_was_changed_is_written_again(done: Done, make_job: MakeJob) -> None:
    job = make_job("changed", like=done[0])
    with (job.output / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x01\x02\x03\x04")
    assert job.weights() != done[0].weights()
    code, output, errors = job.run()
    assert code == 0, errors
    assert COMPLETE not in output
    assert job.weights() == done[0].weights()


def test_a_lora_job_leaves_its_adapter_and_a_model_with_the_adapter_merged(
    make_job: MakeJob,
) -> None:
    settings = {"method": "LoRA", "lora": {"rank": 4}, "maxSteps": 4, "maxLength": 64}
    job = make_job("lora", training=settings)
    code, output, errors = job.run()
    assert code == 0, errors + job.logs()
    assert "Adapter:" in output
    base = AutoModelForCausalLM.from_pretrained(job.volumes / "models/tiny", dtype=torch.float32)
    untrained = {name: value.clone() for name, value in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, job.output / "adapter").merge_and_unload()
    expected = merged.state_dict()
    ours = AutoModelForCausalLM.from_pretrained(job.output / "model", dtype=torch.float32)
    # The adapter knows its base.
    alone = AutoPeftModelForCausalLM.from_pretrained(job.output / "adapter", dtype=torch.float32)
    by_itself = alone.merge_and_unload().state_dict()
    learnt = 0
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, by_itself[name], rtol=1e-5, atol=1e-6)
        learnt += not torch.equal(value, untrained[name])
    assert learnt > 0


def test_a_killed_client_and_the_same_command_again_make_the_same_weights(
    done: Done, make_job: MakeJob
) -> None:
    job = make_job("killed")
    process = job.start()
    job.wait_for_step(3)
    process.kill()
    process.wait()
    job.wait_for_silence()
    assert not (job.output / "manifest.json").exists(), "it was over before it was killed"
    assert job.checkpoints(), "the workers were not asked to save"
    code, output, errors = job.run()
    assert code == 0, errors
    assert COMPLETE not in output
    assert job.logs().count("continuing after step") == 1
    assert job.weights() == done[0].weights()
    assert [line["step"] for line in job.metrics()] == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_says_how_to_go_on(stopped: Stopped) -> None:
    job, code, errors = stopped
    assert code == 143, errors
    assert "To continue: cptjob run stopped.yaml --output stopped --processes 2" in errors
    assert "Traceback" not in errors
    assert job.checkpoints()
    assert not (job.output / "manifest.json").exists()


def test_a_broken_checkpoint_that_is_skipped_is_told_on_the_console(
    stopped: Stopped, make_job: MakeJob
) -> None:
    job = make_job("broken", like=stopped[0])
    newest = max(
        job.output.glob("checkpoints/step-*"), key=lambda path: float(path.name[len("step-") :])
    )
    file = newest / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, errors = job.run()
    assert code == 0, errors
    (told,) = (line for line in errors.splitlines() if newest.name in line)
    assert told.startswith(f"warning: skipped the checkpoint {newest}: {file.name} has")
    assert told.endswith("an older one is tried, and this one is deleted after the next save")
    assert not newest.exists()


def test_another_learning_rate_is_refused_with_both_values(
    stopped: Stopped, make_job: MakeJob
) -> None:
    job = make_job("other-rate", like=stopped[0], training={"learningRate": 0.001})
    before = {path: path.stat().st_mtime_ns for path in job.output.rglob("[!.]*")}
    code, _, errors = job.run()
    assert code == 78, errors
    last = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert "learningRate" in last
    assert "0.003" in last
    assert "0.001" in last
    # Nothing was prepared, and no logs were begun.
    assert {path: path.stat().st_mtime_ns for path in job.output.rglob("[!.]*")} == before


def test_another_division_of_a_step_goes_on(
    done: Done, stopped: Stopped, make_job: MakeJob
) -> None:
    division = {"batchSizePerDevice": 2, "activationCheckpointing": "Full"}
    job = make_job("divided", like=stopped[0], training=division)
    code, _, errors = job.run(processes=1)
    assert code == 0, errors
    assert job.logs().count("continuing after step") == 1
    assert job.result()["steps"] == STEPS
    ours = [line["loss"] for line in job.metrics()]
    theirs = [line["loss"] for line in done[0].metrics()]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0.0)


def test_a_second_job_on_the_same_output_is_told_who_is_there(make_job: MakeJob) -> None:
    job = make_job("busy")
    first = job.start()
    job.wait_for_step(1)
    code, _, errors = job.run()
    assert code == 75
    assert f"is in use by process {first.pid} on" in errors
    assert errors.count("\n") == 1
    first.send_signal(signal.SIGINT)
    assert job.end(first)[0] == 143


def test_a_model_of_another_seed_is_not_called_complete(done: Done, make_job: MakeJob) -> None:
    job = make_job("other-seed", like=done[0])
    job.write(
        training={"seed": 1},
        checkpoint={"onMismatch": "StartNew"},
        elasticPolicy={"maxRestarts": 0},
    )
    code, _, errors = job.run(CPTJOB_FAILPOINT="output.manifest:1")
    assert code == 137, errors
    assert job.weights() != done[0].weights(), "it was killed before its model was there"
    job.write()
    code, output, errors = job.run()
    assert COMPLETE not in output
    assert code == 78, errors
    assert "seed" in errors
    assert not (job.output / "manifest.json").exists()


def test_results_name_the_files_of_the_model(done: Done) -> None:
    job = done[0]
    files = job.result()["files"]
    assert set(files) == {
        str(path.relative_to(job.output)) for path in (job.output / "model").rglob("*")
    }
    assert json.loads((job.output / "model" / "config.json").read_text())["model_type"] == "llama"
