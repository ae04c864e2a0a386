"""What the pages show can be used as it stands: links, manifests, values, names, screens."""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cptjob_api.conditions import Reason
from cptjob_api.manifest import parse_manifest
from cptjob_api.unsupported import unsupported
from cptjob_operator import settings
from cptjob_operator.plan.accept import Accepted, accept

ROOT = Path(__file__).parents[2]
FOUND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(page.relative_to(ROOT)): page for page in FOUND}
NEW_CLUSTER = ROOT / "docs" / "from-an-empty-cluster.md"


@dataclass(frozen=True)
class Block:
    """Code in a page, by the word behind its first fence."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for name, page in PAGES.items():
        text = page.read_text("utf-8")
        for each in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(name, text.count("\n", 0, each.start()) + 1, each[1], each[2])


BLOCKS = list(blocks())
YAML = [block for block in BLOCKS if block.kind == "yaml"]
JOBS = [block for block in YAML if "kind: CPTJob" in block.text]
VALUES = [block for block in YAML if block.text.startswith("# values")]


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What links to a page may end with: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("name", PAGES)
def test_each_link_to_a_heading_leads_to_one(name: str) -> None:
    page = PAGES[name]
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8"))
    lost = [
        f"{target}#{anchor}"
        for target, anchor in links
        if "://" not in target and anchor not in anchors(page.parent / target if target else page)
    ]
    assert lost == []


# --- manifests and values -------------------------------------------------------------------------


def test_blocks_of_each_kind_were_found() -> None:
    assert {block.page for block in JOBS} >= {"docs/guide.md", "docs/cluster.md"}
    assert {block.page for block in VALUES} >= {"docs/cluster.md"}
    mine = [block for block in YAML if block.page == f"docs/{NEW_CLUSTER.name}"]
    assert len(mine) >= 5


@pytest.mark.parametrize("block", JOBS, ids=str)
def test_a_job_in_a_page_is_faultless_and_taken_with_the_settings_of_its_page(block: Block) -> None:
    job = parse_manifest(block.text, str(block)).job
    assert unsupported(job) == []
    (told, *_) = [
        *(settings_of(each) for each in VALUES if each.page == block.page),
        settings.Settings(),
    ]
    assert isinstance(accept(job, told), Accepted)


@pytest.mark.parametrize("block", VALUES, ids=str)
def test_values_in_a_page_are_what_the_chart_takes(block: Block) -> None:
    schema = ROOT / "charts" / "cptjob-operator" / "values.schema.json"
    jsonschema.validate(yaml.safe_load(block.text), json.loads(schema.read_text("utf-8")))
    assert settings_of(block).pools


def settings_of(block: Block) -> settings.Settings:
    """As the operator reads them; the chart adds what it knows."""
    values: dict[str, Any] = yaml.safe_load(block.text)
    return settings.parse(yaml.safe_dump(values["settings"]))


# --- names ----------------------------------------------------------------------------------------


def test_each_reason_in_the_table_of_a_new_cluster_exists() -> None:
    table = NEW_CLUSTER.read_text("utf-8").partition("## 8. ")[2]
    cells = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) > 10
    assert set(named) <= {str(reason) for reason in Reason}
    assert len(named) == len(set(named))


@pytest.mark.parametrize("name", PAGES)
def test_images_in_a_page_have_the_tag_that_is_built(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"\bcptjob/(?:operator|trainer):([\w.]+)", PAGES[name].read_text("utf-8"))
    assert set(named) <= {project["version"]}


# --- screens --------------------------------------------------------------------------------------

CRD = ROOT / "crds" / "training.cptjob.io_cptjobs.yaml"
HEADS = [
    (block, line)
    for block in BLOCKS
    if block.kind == "console"
    for line in block.text.splitlines()
    if line.startswith("NAME ") and "CHECKPOINT" in line and "%" not in line
]


def test_a_screen_of_jobs_has_the_columns_that_kubectl_prints() -> None:
    (version,) = yaml.safe_load(CRD.read_text("utf-8"))["spec"]["versions"]
    columns = version["additionalPrinterColumns"]
    wide = ["NAME", *(each["name"].upper() for each in columns)]
    usual = ["NAME", *(each["name"].upper() for each in columns if not each.get("priority"))]
    client = ["NAME", "STATE", "NODES", "STEP", "PROGRESS", "CHECKPOINT", "RESTARTS", "AGE"]
    assert f"docs/{NEW_CLUSTER.name}" in {block.page for block, _ in HEADS}
    for block, line in HEADS:
        assert line.split() in (wide, usual, client), f"{block}: {line}"
