"""The lock files hold what pyproject.toml asks for, by hash, from any index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
EXTRAS = {
    "run.txt": ["client", "trainer", "demo"],
    "operator.txt": ["operator"],
    "trainer.txt": ["trainer"],
    "dev.txt": ["client", "trainer", "demo", "operator", "dev"],
    "bench.txt": ["client", "trainer", "demo", "operator", "dev", "bench"],
}
INPUTS = {
    "run.txt": "build.in",
    "dev.txt": "build.in",
    "bench.txt": "build.in",
    "images.txt": "images.in",
    "uv.txt": "uv.in",
    "assets.txt": "assets.in",
    "go.txt": "go.in",
}


def pins(path: Path) -> dict[str, str]:
    """Name and version of each locked package."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text("utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def wanted(lock: Path) -> list[Requirement]:
    """What pyproject.toml and the .in file ask this lock for."""
    texts: list[str] = []
    if lock.name in INPUTS:
        lines = (ROOT / "requirements" / INPUTS[lock.name]).read_text("utf-8").split("\n")
        texts += [line.split("#")[0].strip() for line in lines]
    if lock.name in EXTRAS:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        texts += project["dependencies"]
        for extra in EXTRAS[lock.name]:
            texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts if text]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_holds_a_fitting_version_of_everything_asked_for(lock: Path) -> None:
    locked = pins(lock)
    stale = [
        str(requirement)
        for requirement in wanted(lock)
        if not requirement.specifier.contains(
            locked.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
    ]
    assert not stale, f"not in {lock.name}: {stale}; `make lock` writes it anew"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_package_has_a_hash_and_none_has_an_address(lock: Path) -> None:
    text = lock.read_text("utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert "://" not in text
    assert "--index" not in text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_all_locks_agree_on_a_version(lock: Path) -> None:
    development = pins(ROOT / "requirements" / "dev.txt")
    locked = pins(lock)
    assert {name: version for name, version in locked.items() if name in development} == {
        name: version for name, version in development.items() if name in locked
    }


def test_what_a_user_installs_is_part_of_what_a_developer_installs() -> None:
    assert pins(ROOT / "requirements/run.txt").keys() <= pins(ROOT / "requirements/dev.txt").keys()
