"""Estimates against numbers worked out by hand.

A vocabulary of 65536 has 4 bytes a token: 8000 bytes / 4 = 2000 tokens = 20 rows of 100. Two
epochs: 40 rows; batches of 2: 20 steps; 4000 tokens.
"""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cptjob import cli, jobs
from cptjob.estimate import Estimate, estimate, render
from cptjob.volumes import Volumes
from cptjob_trainer import devices
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import CPTJobError
from cptjob_trainer.model.modeldir import check_model

Cli = Callable[..., subprocess.CompletedProcess[str]]


def _config(place: Path, processes: int | None = None) -> TrainerConfig:
    return jobs.load(place / "job.yaml", None, Volumes.parse([], place), processes).config


def _change(place: Path, old: str, new: str) -> None:
    manifest = place / "job.yaml"
    manifest.write_text(manifest.read_text().replace(old, new))


def test_steps_and_tokens_follow_from_the_size_of_the_files(place: Path) -> None:
    answer = estimate(_config(place))
    assert (answer.steps, answer.tokens, answer.rows.total) == (20, 4000, 40)
    assert not answer.rows.tokens_are_counted


def test_more_processes_do_not_change_the_steps(place: Path) -> None:
    answer = estimate(_config(place, processes=2))
    assert (answer.steps, answer.devices) == (20, 2)


def test_general_text_adds_its_share(place: Path) -> None:
    general = place / "volumes" / "data" / "plays"
    general.mkdir()
    (general / "a.jsonl").write_text('{"text": "y"}\n')
    dataset = '    - {name: plays, storageUri: "pvc://data/plays", role: General, weight: 0.2}\n'
    _change(place, "  validation:", dataset + "  validation:")
    assert estimate(_config(place)).rows.total == 50, "40 / (1 - 0.2)"


def test_held_out_documents_are_not_trained_on(place: Path) -> None:
    _change(place, "splitPercent: 0", "splitPercent: 10")
    assert estimate(_config(place)).rows.total == 36


def test_max_steps_is_a_limit(place: Path) -> None:
    _change(place, "epochs: 2", "epochs: 2\n    maxSteps: 5")
    answer = estimate(_config(place))
    assert (answer.steps, answer.tokens) == (5, 1000)


def test_memory_by_hand(place: Path) -> None:
    part = estimate(_config(place)).memory
    # 1000 weights in 32 bits, as many gradients, two moments each.
    assert (part.weights, part.gradients, part.optimizer) == (4000, 4000, 8000)
    # 2 layers, 2 rows of 100 tokens, 8 wide, 17 numbers of 4 bytes; logits over 65536 words, twice.
    assert part.activations == 2 * 200 * 8 * 17 * 4
    assert part.logits == 2 * 4 * 200 * 65536
    assert part.total == 4000 + 4000 + 8000 + 217_600 + 104_857_600


def test_memory_is_split_over_devices_where_it_is_sharded(place: Path) -> None:
    part = estimate(_config(place, processes=4)).memory
    assert (part.weights, part.gradients, part.optimizer) == (1000, 1000, 2000)


# What `test_memory_by_hand` adds up, and the same with 2 inputs and one whole layer of 6400 x 17.
WHOLE, RECOMPUTED = 105_091_200, 104_995_200


@pytest.mark.parametrize(
    ("setting", "needed", "said"),
    [
        ("Auto", WHOLE, "which fits in 111 MiB"),
        ("Auto", RECOMPUTED, "which fits in 111 MiB with activation checkpointing"),
        (
            "Auto",
            RECOMPUTED - 100,
            "which does NOT fit in 111 MiB, even with activation checkpointing",
        ),
        ("Full", RECOMPUTED, "which fits in 111 MiB"),
        ("None", RECOMPUTED, "which does NOT fit in 111 MiB"),
    ],
)
def test_what_fits_is_said_as_the_trainer_would_do_it(
    setting: str, needed: int, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(place, "precision:", f"activationCheckpointing: {setting}\n    precision:")
    room = math.ceil(needed / devices.USABLE)
    monkeypatch.setitem(devices.DEVICES, "Small", devices.Device(1e12, room))
    config = _config(place)
    answer = estimate(config, device="Small", mfu=1.0)
    lines = render(config, answer, "Small").splitlines()
    (line,) = (line for line in lines if line.startswith("memory per device"))
    assert line.endswith(f" MiB, {said}")
    recomputed = setting == "Full" or "with" in said
    assert answer.memory.total == (RECOMPUTED if recomputed else WHOLE)
    assert answer.speed is not None
    flops = (6000 + 9600) * (4 / 3 if recomputed else 1)
    assert answer.speed.tokens_per_second == pytest.approx(1e12 / flops)


def test_a_model_that_run_refuses_is_refused_in_the_same_words(cptjob: Cli, place: Path) -> None:
    model = place / "volumes" / "models" / "small"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = cptjob("estimate", "job.yaml")
    with pytest.raises(CPTJobError) as told:
        check_model(model)
    assert (done.returncode, done.stderr) == (told.value.exit_code, f"error: {told.value}\n")


def test_files_that_run_refuses_are_refused(cptjob: Cli, place: Path) -> None:
    (place / "volumes" / "data" / "law" / "b.jsonl.gz").write_bytes(b"\x1f\x8b")
    done = cptjob("estimate", "job.yaml")
    assert done.returncode == 65
    assert "law/b.jsonl.gz: " in done.stderr


def test_time_from_a_given_speed(place: Path) -> None:
    answer = estimate(_config(place, processes=2), tokens_per_second=10.0)
    assert answer.hours == pytest.approx(400 / 3600)
    assert answer.device_hours == pytest.approx(800 / 3600)


def test_hours_are_of_gpus_only_where_there_are_some(cptjob: Cli, place: Path) -> None:
    speed = ("--tokens-per-second", "1")
    assert "\ndevice-hours      1.11 (1 device)\n" in cptjob("estimate", "job.yaml", *speed).stdout
    assert "\nGPU-hours " in cptjob("estimate", "job.yaml", "--device", "H100").stdout
    with (place / "job.yaml").open("a") as file:
        file.write("  trainer: {resourcesPerNode: {limits: {nvidia.com/gpu: 2}}}\n")
    assert "\nGPU-hours         2.22 (2 devices)\n" in cptjob("estimate", "job.yaml", *speed).stdout


def test_a_warm_up_that_is_longer_than_the_job_is_told(cptjob: Cli, place: Path) -> None:
    _change(place, "    epochs: 2", "    epochs: 2\n    schedule: {warmupSteps: 500}")
    done = cptjob("estimate", "job.yaml")
    assert done.returncode == 0
    assert "warning: training.schedule.warmupSteps: 500 is more than the job's 20 st" in done.stderr


def test_a_batch_that_the_processes_do_not_divide_is_told(cptjob: Cli) -> None:
    told = cptjob("estimate", "job.yaml", "--processes", "3").stderr
    assert "training.globalBatchSize: 2 is no multiple of the 3 processes, so that each" in told
    assert "computes 1 empty row besides" in told
    assert cptjob("estimate", "job.yaml", "--processes", "2").stderr == ""


def test_the_check_of_data_warns_by_the_estimate(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(place, "    epochs: 2", "    epochs: 2\n    schedule: {warmupSteps: 500}")
    monkeypatch.chdir(place)
    monkeypatch.setattr(cli, "_run_module", lambda *_: 0)
    with pytest.raises(SystemExit):
        cli.main(["validate", "--data", "job.yaml"])
    assert "warmupSteps: 500 is more than the job's 20 steps" in capsys.readouterr().err


def test_time_from_a_device(place: Path) -> None:
    answer = estimate(_config(place), device="H100", mfu=0.5)
    assert answer.speed is not None
    # 6 x 1000 weights + 6 x 2 layers x 8 wide x 100 tokens.
    assert answer.speed.tokens_per_second == pytest.approx(0.5 * 989e12 / (6000 + 9600))


def test_time_from_an_earlier_run(place: Path) -> None:
    config = _config(place)
    config.paths.output.mkdir(parents=True)
    lines = [{"step": n, "tokensPerSecond": speed} for n, speed in enumerate((1.0, 8.0, 9.0))]
    text = "\n".join(json.dumps(line) for line in lines)
    (config.paths.output / "metrics.jsonl").write_text(text + '\n{"step": 3, "tok')
    answer = estimate(config)
    assert answer.speed is not None
    assert answer.speed.tokens_per_second == 8.0


def test_without_a_speed_there_is_no_time(place: Path) -> None:
    answer: Estimate = estimate(_config(place))
    assert (answer.speed, answer.hours, answer.device_hours) == (None, None, None)


def test_data_that_was_prepared_under_the_same_names_is_not_taken_for_this_job(place: Path) -> None:
    config = _config(place)
    prepared = config.paths.prepared / "abc"
    prepared.mkdir(parents=True)
    sources = [{"name": "law", "role": "Domain", "rows": 7}]
    value = {"maxLength": 100, "sources": sources, "totalRows": 14, "request": "other"}
    (prepared / "prepared.json").write_text(json.dumps(value))
    assert not estimate(config).rows.tokens_are_counted


def test_the_command_says_where_its_numbers_come_from(cptjob: Cli) -> None:
    done = cptjob("estimate", "job.yaml", "--tokens-per-second", "10")
    assert done.returncode == 0, done.stderr
    assert "estimated from the size of the files at 4 bytes a token" in done.stdout
    assert "0:06:40 (0.11 hours)" in done.stdout
    unknown = cptjob("estimate", "job.yaml")
    assert "give --tokens-per-second N or --device NAME" in unknown.stdout


def test_a_small_job_has_figures_too(cptjob: Cli) -> None:
    done = cptjob("estimate", "job.yaml", "--tokens-per-second", "1e4")
    assert "weights         3.91 KiB\n" in done.stdout
    assert "memory per device 100 MiB\n" in done.stdout
    assert "time              less than a second of training\n" in done.stdout
    assert " 0.0 " not in done.stdout


@pytest.mark.parametrize(("vocabulary", "tokens"), [(2048, 8000 / 2.75), (131_072, 8000 / 4.25)])
def test_a_larger_vocabulary_makes_fewer_tokens(
    place: Path, vocabulary: int, tokens: float
) -> None:
    config = place / "volumes" / "models" / "small" / "config.json"
    config.write_text(config.read_text().replace("65536", str(vocabulary)))
    rows = math.ceil(tokens / 100)
    assert estimate(_config(place)).rows.total == 2 * rows
