"""torchx's own commands against a real API server, with the operator at work."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from world import World

from cptjob_api.manifest import parse_manifest

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "deploy" / "examples" / "tiny.yaml")

Torchx = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture(name="torchx")
def make_torchx(world: World, tmp_path: Path) -> Torchx:
    """The command, where .torchxconfig names the test's namespace, and a file of that folder."""
    (tmp_path / ".torchxconfig").write_text(f"[cptjob]\nnamespace = {world.namespace}\n")
    environment = os.environ | {"KUBECONFIG": str(world.plane.kubeconfig), "LOGLEVEL": "WARNING"}
    environment.pop("TORCHXCONFIG", None)
    program = str(Path(sys.executable).with_name("torchx"))

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )

    return call


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The lines of an error; there is nothing else."""
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines, done.stdout
    assert all(line.startswith("error: ") for line in lines), done.stderr
    return done.stderr


def test_the_commands_tell_a_story(world: World, torchx: Torchx) -> None:
    handle = f"cptjob://torchx/{world.namespace}:story"
    request = ("-s", "cptjob", "cptjob.train", "--manifest", TINY, "--name", "story")
    done = torchx("run", *request, "--nodes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{handle}\n"
    spec = world.job("story")["spec"]
    assert spec["trainer"]["numNodes"] == 2
    again = refusal(torchx("run", *request))
    assert again.startswith(f"error: there is a job story in namespace {world.namespace} already")

    world.prepare("story")
    world.run("story", 2)
    page = torchx("status", handle).stdout
    assert re.search(r"State: RUNNING\n", page), page
    assert "story: Running\n" in page
    assert torchx("list").stdout.splitlines()[-1].split() == [handle, "RUNNING"]
    assert "'num_replicas': 2" in torchx("describe", handle).stdout
    said = torchx("log", handle).stdout.splitlines()
    assert {line.split()[0] for line in said} == {"coordinator/0", "worker/0", "worker/1"}
    assert torchx("log", "--regex", "cannot be read", f"{handle}/worker/1").stdout.startswith(
        "worker/1 the log of story-"
    )
    world.complete("story")
    world.wait(lambda: world.status("story").get("phase") == "Complete", "the job to be complete")
    assert re.search(r"State: SUCCEEDED\n", torchx("status", handle).stdout)


def test_cancel_deletes_a_job(world: World, torchx: Torchx) -> None:
    handle = torchx("run", "cptjob.train", "--manifest", TINY).stdout.strip()
    assert world.find("tiny")
    done = torchx("cancel", handle)
    assert (done.returncode, done.stderr) == (0, "")
    assert not world.find("tiny")
    missing = torchx("status", handle)
    assert missing.returncode == 1
    assert "does not exist or has been removed" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_dry_run_shows_the_job_and_makes_none(world: World, torchx: Torchx) -> None:
    done = torchx("run", "--dryrun", "cptjob.train", "--manifest", TINY)
    assert done.returncode == 0, done.stderr
    text = done.stdout.partition("=== SCHEDULER REQUEST ===\n")[2]
    shown = parse_manifest(text).job
    assert shown.metadata.namespace == world.namespace
    assert shown.spec == parse_manifest(Path(TINY).read_text("utf-8")).job.spec
    assert not world.find("tiny")


def test_what_is_refused_is_told_without_a_traceback(
    world: World, torchx: Torchx, tmp_path: Path
) -> None:
    job = yaml.safe_load(Path(TINY).read_text("utf-8"))
    job["spec"]["training"]["learnigRate"] = 1
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(job))
    broken = refusal(torchx("run", "cptjob.train", "--manifest", "broken.yaml"))
    assert re.match(r"error: broken\.yaml:\d+: spec\.training\.learnigRate: .*learningRate", broken)
    foreign = refusal(torchx("run", "-s", "cptjob", "utils.echo", "--msg", "hello"))
    assert foreign.startswith("error: echo has no manifest, which a CPTJob is made of")
    long = refusal(torchx("run", "cptjob.train", "--manifest", TINY, "--name", "x" * 41))
    assert "at most 40 characters" in long
    elsewhere = ("-cfg", "kubeconfig=none", "cptjob.train", "--manifest", TINY)
    assert "none is not there" in refusal(torchx("run", *elsewhere))
    assert not world.find("tiny")


def test_torchx_keeps_running_on_this_machine(torchx: Torchx, tmp_path: Path) -> None:
    here = ("run", "-s", "local_cwd", "-cfg", "log_dir=logs")
    done = torchx(*here, "utils.touch", "--file", "made")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made").exists()
    assert torchx(*here, "cptjob.train", "--manifest", TINY).returncode == 1
    said = "".join(each.read_text() for each in (tmp_path / "logs").rglob("worker/0/stderr.log"))
    assert said.startswith("cptjob.train is for `torchx run -s cptjob`")
