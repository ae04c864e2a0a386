"""What is imported is declared, by the extra of the part that imports it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Import names that differ from those of their packages.
PACKAGES = {
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}
PARTS = {
    "client/cptjob": {"client"},
    "crds/cptjob_api": set[str](),
    "operator/cptjob_operator": {"operator"},
    "trainer/cptjob_trainer": {"trainer", "demo"},
}


def declared(extras: set[str]) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in lines}


def imported(part: str) -> set[str]:
    names: set[str] = set()
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    ours = {"cptjob", "cptjob_api", "cptjob_operator", "cptjob_trainer"}
    return {PACKAGES.get(name, name) for name in names - ours - sys.stdlib_module_names}


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_imports_is_declared(part: str) -> None:
    assert imported(part) <= declared(PARTS[part])


def test_rich_is_for_the_client_only() -> None:
    assert "rich" in declared({"client"})
    assert "rich" not in declared({"trainer"})
