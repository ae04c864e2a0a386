"""The images are made of what is locked, and the way to the packages leaves no trace in them."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "deploy"))
import images  # noqa: E402

FILES = [ROOT / "deploy" / f"Containerfile.{name}" for name in images.IMAGES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_everything_that_an_image_copies_is_there_and_not_ignored(file: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    kept = tuple(line.removeprefix("!") for line in ignored if line.startswith("!"))
    for line in re.findall(r"^COPY (?!--from)(.+)$", file.read_text("utf-8"), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.startswith(kept), source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_package_of_the_wheel_is_copied(file: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    copied = re.findall(r"^COPY (\S+) \S+$", file.read_text("utf-8"), re.MULTILINE)
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert package in copied or str(Path(package).parent) in copied, package


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_runs_as_a_numeric_user_other_than_root(file: Path) -> None:
    (user,) = re.findall(r"^USER (.+)$", file.read_text("utf-8"), re.MULTILINE)
    assert user == "65532:65532"  # numeric: the kubelet cannot look up whether a name is root's


def test_the_way_to_the_packages_goes_in_as_a_secret_without_what_is_of_this_machine() -> None:
    settings = {
        "index-url": "https://user:word@index.test/simple",
        "trusted-host": "index.test\nother.test",
        "cert": "/here/ca.pem",
        "find-links": "/here/wheels",
    }
    told = images.pip_file(settings, has_ca=True)
    assert told.splitlines() == [
        "[global]",
        "index-url = https://user:word@index.test/simple",
        "trusted-host = index.test other.test",
        "cert = /run/secrets/ca",
    ]
    command = images.command(
        *("podman", "operator"), tag="t", revision="r", secrets={"pip": Path("/tmp/pip.conf")}
    )
    assert "id=pip,src=/tmp/pip.conf" in command
    assert not any("word" in part for part in command)


@pytest.mark.parametrize("tool", images.TOOLS)
def test_each_tool_is_given_the_base_the_version_and_its_own_flags(tool: str) -> None:
    command = images.command(
        *(tool, "trainer"),
        tag="t",
        revision="r",
        secrets={},
        base_image="base",
        flags=["--network", "host"],
    )
    assert command[:2] == [tool, "build"]
    assert command[-3:] == ["--network", "host", "."]
    for part in ("BASE_IMAGE=base", f"VERSION={images.version()}", "cptjob/trainer:t"):
        assert part in command
