"""Where the programs of the control plane come from."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testplane import binaries
from testplane.binaries import ASSETS, CONTROL_PLANE, GROUPS, Group, ToolError

GO = """#!/bin/sh
echo "$@" >> "$CALLS"
for argument; do
  case "$previous" in -o) into=$argument;; esac
  previous=$argument
done
[ -z "$FAILS" ] || { echo "no such module"; exit 1; }
for path; do
  case "$path" in */*/cmd/*|*/server/v3) name=${path%/v3}; touch "$into/${name##*/}";; esac
done
"""


@pytest.fixture(name="calls", autouse=True)
def replace_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `go` that makes empty files and writes down how it was called."""
    folder = tmp_path / "go"
    folder.mkdir()
    (folder / "go").write_text(GO)
    (folder / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv(ASSETS, raising=False)
    return tmp_path / "calls"


def quiet(line: str) -> None:
    pass


def test_what_is_built_once_is_found_again(tmp_path: Path, calls: Path) -> None:
    said: list[str] = []
    found = binaries.find(["etcd", "kwok"], said.append, tmp_path / "cache")
    assert {name: path.name for name, path in found.items()} == {"etcd": "etcd", "kwok": "kwok"}
    assert all(path.is_file() for path in found.values())
    assert [line.split(" from")[0] for line in said if "building" in line] == [
        f"building etcd {GROUPS['etcd'].version}",
        f"building kwok {GROUPS['kwok'].version}",
    ]
    assert binaries.find(["etcd", "kwok"], quiet, tmp_path / "cache") == found
    assert len(calls.read_text().splitlines()) == 2


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path: Path, calls: Path) -> None:
    def find(_: int) -> dict[str, Path]:
        return binaries.find(["kubernetes"], quiet, tmp_path / "cache")

    with ThreadPoolExecutor(2) as both:
        one, other = both.map(find, range(2))
    assert one == other
    assert len(calls.read_text().splitlines()) == 1


def test_what_the_assets_hold_is_not_built(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("etcd", "kube-apiserver", "kubectl"):  # what envtest brings
        (assets / name).touch()
    monkeypatch.setenv(ASSETS, str(assets))
    found = binaries.find(CONTROL_PLANE, quiet, tmp_path / "cache")
    assert [name for name, path in found.items() if path.parent == assets] == [
        "etcd",
        "kube-apiserver",
        "kubectl",
    ]
    assert all(path.is_file() for path in found.values())
    assert set(found) == {name for group in CONTROL_PLANE for name in GROUPS[group].programs}
    assert "etcd/server" not in calls.read_text()


def test_assets_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASSETS, "/nowhere")
    with pytest.raises(ToolError, match="KUBEBUILDER_ASSETS names /nowhere, which is no folder"):
        binaries.find(["etcd"])


def test_a_missing_go_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ToolError, match="`go` is needed to build etcd: run `make tools`"):
        binaries.find(["etcd"], quiet, tmp_path / "cache")


def test_a_failed_build_says_what_go_said_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "yes")
    with pytest.raises(ToolError, match=r"building etcd v3\S+ failed; `go build` said:\nno such"):
        binaries.find(["etcd"], quiet, tmp_path / "cache")
    monkeypatch.setenv("FAILS", "")
    assert binaries.find(["etcd"], quiet, tmp_path / "cache")["etcd"].is_file()


def test_the_key_changes_with_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = GROUPS["etcd"]
    before = group.key
    folder = tmp_path / group.name
    folder.mkdir()
    for name in ("go.mod", "go.sum"):
        text = (group.folder / name).read_text("utf-8")
        (folder / name).write_text(text.replace(group.version, "v9.9.9"))
    monkeypatch.setattr(binaries, "TOOLS", tmp_path)
    assert group.version == "v9.9.9"
    assert group.key != before


@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.name)
def test_each_group_is_pinned_with_hashes(group: Group) -> None:
    tools = (group.folder / "go.mod").read_text("utf-8")
    assert all(path in tools for path in group.programs.values())
    assert f"{group.module} {group.version} h1:" in (group.folder / "go.sum").read_text("utf-8")


def test_what_only_long_tests_need_is_built_by_name_alone(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binaries, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(binaries, "GROUPS", {name: GROUPS[name] for name in ("kwok", "prometheus")})
    assert binaries.main([]) == 0
    assert "prometheus" not in calls.read_text()
    assert binaries.main(["prometheus"]) == 0
    assert "prometheus" in calls.read_text()


def test_an_unknown_group_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert binaries.main(["etdc"]) == 64
    assert capsys.readouterr().err.startswith("error: no such group: etdc; there are kubernetes")
