"""The command line: help, one-line errors, exit codes."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cptjob import cli, jobs
from cptjob.volumes import Volumes
from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import UsageError

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_help_names_every_command_and_imports_nothing_heavy(place: Path) -> None:
    program = (
        "import sys, cptjob.cli\n"
        "try: cptjob.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'torchx', 'kubernetes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    commands = "run validate prepare estimate report export submit status suspend resume cancel"
    for command in commands.split():
        assert f"\n  {command} " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_local_run_needs_no_torch_in_the_client() -> None:
    program = "import sys, cptjob.local, cptjob.estimate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_manifest_for_another_namespace_is_not_submitted(place: Path, cptjob: Cli) -> None:
    file = place / "job.yaml"
    file.write_text(file.read_text().replace("name: small", "name: small\n  namespace: a"))
    done = cptjob("submit", "job.yaml", "-n", "b")
    assert done.returncode == UsageError.exit_code
    assert done.stderr == "error: the manifest is for namespace a, and not for b\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "No such command 'train'"),
        (("run",), "Missing argument 'FILE'"),
        (("run", "job.yaml", "--processes", "0"), "--processes"),
        (("run", "job.yaml", "--volume", "models"), "--volume models: write --volume CLAIM=DIR"),
        (("validate", "job.yaml", "--volume", "models"), "--volume models: write --volume CLAIM"),
        (("estimate", "job.yaml", "--device", "H9"), "--device H9: not known; give one of H200"),
        (("run", ""), "FILE is empty"),
        (("run", "job.yaml", "--output", ""), "--output is empty: give a path"),
        (("run", "job.yaml", "--volume", "models="), "--volume models=: write --volume CLAIM=DIR"),
        (("export", "job.yaml", "--step", "1", "--to", ""), "--to is empty: give a path"),
        (("report", ""), "OUT is empty: give a path"),
    ],
)
def test_a_wrong_command_is_one_line_and_64(
    cptjob: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cptjob(*arguments)
    assert done.returncode == UsageError.exit_code
    assert message in done.stderr
    assert ".;" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("wrong", "right", "code", "message"),
    [
        ("epochs: 2", "epocks: 2", 78, "job.yaml:11: spec.training.epocks: unknown field; did you"),
        ("epochs: 2", "epochs: two", 78, "job.yaml:11: spec.training.epochs: must be a whole numb"),
        ("spec:", "spec: [", 78, "job.yaml:"),
        ("models/small", "models/other", 66, "job.yaml:6: spec.model.storageUri: pvc://models/oth"),
        ("data/law", "data/laws", 66, "job.yaml:8: spec.datasets[0].storageUri: pvc://data/laws"),
        ("pvc://models/small", "file://lost", 66, "no such path; put it there or correct the path"),
        ("pvc://models/small", "s3://bucket/small", 78, "job.yaml:6: spec.model.storageUri: s3://"),
        ("maxLength: 100", "maxLength: 513", 78, "job.yaml:12: spec.training.maxLength: 513 is mo"),
        (
            "precision: Float32",
            "schedule: {minLearningRate: 0.001}",
            78,
            "job.yaml:14: spec.training.schedule.minLearningRate: 0.001 is not less",
        ),
        (
            "  output:",
            "  trainer: {resourcesPerNode: {limits: {memory: -1}}}\n  output:",
            78,
            "job.yaml:15: spec.trainer.resourcesPerNode.limits.memory: -1 is below 0",
        ),
        ("  output:", "  #output:", 78, "job.yaml:5: spec.output.storageUri: not given"),
    ],
)
def test_a_bad_manifest_says_what_and_where(
    cptjob: Cli, place: Path, wrong: str, right: str, code: int, message: str
) -> None:
    manifest = place / "job.yaml"
    manifest.write_text(manifest.read_text().replace(wrong, right))
    done = cptjob("run", "job.yaml")
    assert message in done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert not (place / "volumes" / "results").exists(), "nothing was started"


def test_the_command_alone_prints_its_help(cptjob: Cli) -> None:
    done = cptjob()
    assert done.stdout == cptjob("--help").stdout
    assert (done.returncode, done.stderr) == (UsageError.exit_code, "")


def test_a_manifest_that_may_not_be_read_is_66(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Root may read everything, so the refusal is made here.
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(Path, "read_bytes", _forbidden)
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(place / "job.yaml")])
    assert ended.value.code == 66
    assert capsys.readouterr().err.endswith("job.yaml: cannot be read: Permission denied\n")


def _forbidden(_: Path) -> bytes:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_missing_manifest_is_66(cptjob: Cli) -> None:
    done = cptjob("validate", "no.yaml")
    assert done.returncode == 66
    assert done.stderr == "error: no.yaml: cannot be read: No such file or directory\n"


def test_a_missing_claim_names_the_path_and_the_option(cptjob: Cli, place: Path) -> None:
    (place / "volumes" / "models").rename(place / "elsewhere")
    done = cptjob("estimate", "job.yaml")
    assert done.returncode == 66
    assert str(place / "volumes" / "models" / "small") in done.stderr
    assert "give --volume models=DIR" in done.stderr
    found = cptjob("estimate", "job.yaml", "--volume", "models=elsewhere")
    assert found.returncode == 0, found.stderr


def test_all_that_is_missing_is_told_at_once(cptjob: Cli, place: Path) -> None:
    (place / "volumes").rename(place / "elsewhere")
    done = cptjob("run", "job.yaml")
    assert done.returncode == 66
    model, data = done.stderr.splitlines()
    assert model.startswith("error: job.yaml:6: spec.model.storageUri: pvc://models/small is ")
    assert data.startswith("error: job.yaml:8: spec.datasets[0].storageUri: pvc://data/law is ")


@pytest.mark.parametrize(
    "command", [("run",), ("validate",), ("validate", "--data"), ("estimate",)]
)
def test_a_volume_of_no_claim_is_refused_with_the_nearest(
    cptjob: Cli, place: Path, command: tuple[str, ...]
) -> None:
    done = cptjob(*command, "job.yaml", "--volume", f"model={place}")
    assert done.returncode == UsageError.exit_code
    assert done.stderr == (
        "error: --volume model: the manifest names no such claim; did you mean models?\n"
    )


def test_gpus_that_this_machine_has_not_are_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place / "job.yaml"
    load = lambda: jobs.load(manifest, None, Volumes.parse([], place), 1)  # noqa: E731
    monkeypatch.setattr(jobs, "DRIVERS", (str(place / "none"),))
    assert not load().lacks_gpus
    trainer = "  trainer: {resourcesPerNode: {limits: {nvidia.com/gpu: 8}}}\n"
    manifest.write_text(manifest.read_text() + trainer)
    assert load().lacks_gpus
    monkeypatch.setattr(jobs, "DRIVERS", (str(place),))
    assert not load().lacks_gpus


def test_without_a_kubeconfig_the_message_says_what_to_do(cptjob: Cli) -> None:
    done = cptjob("status", "--kubeconfig", "none.yaml")
    assert done.returncode == 69
    assert (done.stdout, done.stderr) == (
        "",
        "error: no cluster is configured: none.yaml is not there; give --kubeconfig FILE or set "
        "KUBECONFIG; `cptjob run` needs no cluster\n",
    )


def test_a_good_manifest_is_valid_even_where_its_volumes_are_not(cptjob: Cli, place: Path) -> None:
    (place / "volumes").rename(place / "away")
    done = cptjob("validate", "job.yaml")
    assert (done.returncode, done.stdout) == (0, "job.yaml: small is a valid CPTJob\n")


def test_an_output_that_is_a_file_is_73(cptjob: Cli, place: Path) -> None:
    (place / "file").write_text("")
    done = cptjob("run", "job.yaml", "--output", "file")
    assert done.returncode == 73
    assert "cannot write the output folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_broken_model_is_refused_by_the_trainer_in_one_line(cptjob: Cli, place: Path) -> None:
    weights = place / "volumes" / "models" / "small" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    done = cptjob("run", "job.yaml", "--output", "out")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (65, 66, 78)
    assert len(errors) == 1
    assert "pytorch_model.bin: weights" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (place / "out" / "model").exists()


def test_what_only_a_cluster_heeds_is_named_in_one_note(cptjob: Cli, place: Path) -> None:
    manifest = place / "job.yaml"
    assert "note:" not in cptjob("estimate", "job.yaml").stderr
    policies = "suspend: true\n  activeDeadlineSeconds: 60\n  failurePolicy: {maxRestarts: 1}\n"
    manifest.write_text(f"{manifest.read_text()}  {policies}  ttlSecondsAfterFinished: 0\n")
    done = cptjob("estimate", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "note: a local run passes over what only a cluster heeds: spec.failurePolicy, "
        "spec.ttlSecondsAfterFinished\n"
        "note: spec.suspend holds a job back on a cluster only; a local run starts at once\n"
        "note: spec.activeDeadlineSeconds ends a job on a cluster only; a local run goes on after "
        "60 seconds, until it is complete or stopped with Ctrl-C\n"
    )


def test_processes_are_compared_with_the_gpus(cptjob: Cli, place: Path) -> None:
    manifest = place / "job.yaml"
    trainer = "  trainer: {numProcPerNode: 4, resourcesPerNode: {limits: {nvidia.com/gpu: 8}}}\n"
    text = manifest.read_text() + trainer
    manifest.write_text(text)
    fewer = cptjob("estimate", "job.yaml")
    assert fewer.returncode == 0
    assert fewer.stderr == (
        "note: job.yaml:16: spec.trainer.numProcPerNode: 4 processes of a worker with 8 GPUs use 4 "
        "of them; leave it out to use all\n"
    )
    manifest.write_text(text.replace("numProcPerNode: 4", "numProcPerNode: 9"))
    more = cptjob("validate", "job.yaml")
    assert more.returncode == 78
    assert "job.yaml:16: spec.trainer.numProcPerNode: 9 processes are more than the" in more.stderr


def test_a_command_that_is_killed_leaves_nothing_in_the_temporary_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(place)
    seen: list[tuple[list[str], str, list[Path]]] = []

    def run(command: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        seen.append((command[3:], input, list(folder.iterdir())))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", "--data", "job.yaml"])
    assert ended.value.code == 7
    ((arguments, given, left),) = seen
    assert arguments == ["--config", "/dev/stdin", "--check-only"]
    assert TrainerConfig.from_json(given).name == "small"
    assert left == []
