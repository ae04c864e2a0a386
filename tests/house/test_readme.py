"""What the README and the other pages say exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cptjob_trainer import errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tree_in_the_readme_is_what_is_there() -> None:
    check = subprocess.run(
        [sys.executable, "docs/tree.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_each_make_command_named_in_a_page_is_in_the_makefile(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z0-9]+):.*## ", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z0-9]+)", page.read_text("utf-8"), re.MULTILINE))
    assert named
    assert named <= targets


def test_the_guide_names_every_exit_code_that_an_error_has() -> None:
    def codes(kind: type[errors.CPTJobError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(each) for each in kind.__subclasses__()))

    table = (ROOT / "docs" / "guide.md").read_text("utf-8").partition("## 6. Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    named = {int(code) for row in rows for code in row.split(",")}
    assert codes(errors.CPTJobError) <= named


def test_decisions_are_numbered_without_gaps_and_titled_by_their_number() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, page in enumerate(decisions, start=1):
        assert page.name.startswith(f"{number:04d}-")
        assert page.read_text("utf-8").startswith(f"# {number}. ")
