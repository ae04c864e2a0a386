"""What `cptjob run` cannot do: it says so in one line, and leaves what is there as it was."""

import ctypes
import hashlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MakeJob = Callable[..., Any]
Done = tuple[Any, str, list[dict[str, Any]]]
Stopped = tuple[Any, int, str]

PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
VOLUME_BYTES = 64 << 20
# Less than the file that a rank writes of a checkpoint, more than all that is written around it.
LITTLE = 1 << 20


def tree(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error_of(errors: str) -> str:
    """The one line that says what is wrong."""
    found = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, errors
    assert "Traceback" not in errors
    return found[0]


# -- a folder that cannot be written ---------------------------------------------------------------


def heed_permissions() -> None:
    """In a process that is about to run a program: root is not above the permissions of files."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if os.getuid() == 0 and libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "this root may not give up a capability")


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_an_output_that_may_not_be_written_is_named_and_stays(
    done: Done, make_job: MakeJob
) -> None:
    job = make_job("read-only", like=done[0], training={"seed": 1})
    job.before = heed_permissions
    (job.output / ".client.lock").unlink()
    before = tree(job.output)
    with read_only(job.output):
        code, _, errors = job.run()
    assert code == 73, errors
    assert error_of(errors) == (
        f"error: cannot write the output folder {job.output}: Permission denied; "
        "choose another one with --output or change its permissions"
    )
    assert tree(job.output) == before


@pytest.mark.parametrize("folder", ["prepared", "checkpoints"])
def test_a_part_of_the_output_that_may_not_be_written_is_named(
    folder: str, make_job: MakeJob
) -> None:
    job = make_job(f"read-only-{folder}", elasticPolicy={"maxRestarts": 0})
    job.before = heed_permissions
    (job.output / folder).mkdir(parents=True)
    with read_only(job.output / folder):
        code, _, errors = job.run(processes=1)
    assert code == 73, errors
    said = error_of(errors)
    assert str(job.output / folder) in said
    assert "Permission denied" in said
    assert "permissions" in said.partition("Permission denied")[2], "it says what to do"
    assert not (job.output / "model").exists()


# -- a volume that is full -------------------------------------------------------------------------


class SmallVolume:
    """A volume in the place of a job's output, for the processes of that job alone."""

    def __init__(self, job: Any) -> None:
        output = job.output
        output.mkdir()
        user = [] if os.getuid() == 0 else ["--map-root-user"]
        script = f'mount -t tmpfs -o size={VOLUME_BYTES} none "$1" && echo mounted && read _'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *user, "sh", "-c", script, "sh", str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._holder.stdout is not None
        self.mounted = self._holder.stdout.readline().strip() == "mounted"
        pid = self._holder.pid
        job.prefix = (
            *("nsenter", f"--target={pid}", "--mount"),
            *(["--user", "--preserve-credentials"] if user else []),
            # Who enters stands at the root of what is mounted.
            *("sh", "-c", 'cd "$0" && exec "$@"', str(job.place)),
        )
        job.view = Path(f"/proc/{pid}/root{output}")

    def end(self) -> None:
        self._holder.communicate("\n")


@contextmanager
def little_room(job: Any) -> Iterator[Callable[[], None]]:
    """Around the runs of a job whose output is there: nothing of LITTLE bytes can be added, until
    what is given here is called. Where the machine lets nobody mount a volume, the kernel's limit
    on the size of files stops the same writes.
    """
    content = job.output.rename(job.output.with_name(f"{job.name}-content"))
    volume = SmallVolume(job)
    if volume.mounted:
        shutil.copytree(content, job.output, dirs_exist_ok=True)
        filler = job.output / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(job.output).free - LITTLE))
        make_room = filler.unlink
    else:
        job.prefix, job.view = (), None
        job.output.rmdir()
        content.rename(job.output)
        job.before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE, LITTLE))
        make_room = lambda: setattr(job, "before", None)  # noqa: E731
    try:
        yield make_room
    finally:
        volume.end()


def test_a_full_disk_in_a_save_costs_no_checkpoint_and_with_room_the_same_command_goes_on(
    done: Done, stopped: Stopped, make_job: MakeJob
) -> None:
    job = make_job("full", like=stopped[0])
    with little_room(job) as make_room:
        before = tree(job.output)
        code, _, errors = job.run()
        assert code == 74, errors
        said = error_of(errors)
        for part in (
            "no room to save step-",
            "are free on the volume of",
            "MB are needed",
            "lower checkpoint.keepLast, delete what is not needed, or put the output on another",
            "earlier checkpoints are untouched, the newest is step-",
        ):
            assert part in said
        files = [name for name in before if name.startswith("checkpoints/step-")]
        after = tree(job.output)
        assert files
        assert {name: after.get(name) for name in files} == {name: before[name] for name in files}
        left = [name for name in after if name.startswith("checkpoints/step-")]
        assert left == files, "a half checkpoint was left"
        make_room()
        code, _, errors = job.run()
        assert code == 0, errors + job.logs()
        assert job.weights() == done[0].weights()
        assert job.checkpoints() == [8, 12]


# -- data and checkpoints that do not fit ----------------------------------------------------------


def test_data_that_is_all_held_out_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "the same document"}\n' * 9)
    data = {"name": "same", "storageUri": f"file://{tmp_path}/data.jsonl"}
    job = make_job("held-out", datasets=[data], validation={"splitPercent": 50})
    code, _, errors = job.run(processes=1)
    assert code == 65, errors
    said = error_of(errors)
    assert f"{tmp_path}/data.jsonl: all data of same is held out: its 9 documents fall" in said
    assert "add documents, lower validation.splitPercent (0 holds nothing out)" in said
    assert not (job.output / "model").exists()
    assert not (job.output / "checkpoints").exists()


def test_checkpoints_of_another_model_data_and_seed_are_refused_with_both_values_of_each(
    stopped: Stopped, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job("another", like=stopped[0], training={"seed": 7})
    job.volumes = shutil.copytree(job.volumes, tmp_path / "volumes")
    weights = job.volumes / "models" / "tiny" / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-4] + b"\x01\x02\x03\x04")
    before = tree(job.output / "checkpoints")
    said, values = _refused(job)
    assert values == {"training.seed": ("0", "7")}
    assert "model is pvc://models/tiny in both, and what that holds, or how it is used" in said

    # What differs in the data is known once it is prepared.
    weights.write_bytes(sound)
    job.write()
    file = next((job.volumes / "data" / "domain").glob("*.jsonl"))
    with file.open("a") as lines:
        lines.write('{"text": "Another document."}\n')
    said, values = _refused(job)
    assert "model" not in said.partition("another run")[2]
    assert "(pvc://data/general) in both, and what that holds" in said
    assert tree(job.output / "checkpoints") == before


def _refused(job: Any) -> tuple[str, dict[str, tuple[str, str]]]:
    """What is said, and what differs: theirs and ours, by name."""
    code, _, errors = job.run(processes=1)
    assert code == 78, errors
    said = error_of(errors)
    found = re.findall(r"(\S+) is (\S+) in the checkpoint and (\S+) in this job", said)
    values = {name: (theirs, ours.rstrip(";.")) for name, theirs, ours in found}
    assert all(theirs != ours for theirs, ours in values.values())
    assert said.endswith(
        "Restore the old value, give another output, or set checkpoint.onMismatch: StartNew to "
        "begin anew"
    )
    return said, values
