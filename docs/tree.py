"""Write the tree in README.md, or check that it is true: `python docs/tree.py [--check]`.

A module's line is the first sentence of its docstring; a document's is its title. What has neither
gets its line here. The folders are shown at once, and every file of two levels, and of the packages
below them, behind a fold.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree: `make generate` writes it -->\n", "<!-- end of tree -->"
PACKAGES = {
    "client/cptjob",
    "crds/cptjob_api",
    "operator/cptjob_operator",
    "operator/cptjob_operator/edge",
    "operator/cptjob_operator/objects",
    "operator/cptjob_operator/plan",
    "trainer/cptjob_trainer",
    "trainer/cptjob_trainer/checkpoint",
    "trainer/cptjob_trainer/data",
    "trainer/cptjob_trainer/model",
    "trainer/cptjob_trainer/results",
    "trainer/cptjob_trainer/run",
    "trainer/cptjob_trainer/training",
}
COLUMN = 30

LINES = {
    ".ci": "what a change must pass",
    ".ci/run": "set-up, `make check`, `make tools`, `make test`, `make e2e`, each timed",
    ".dockerignore": "what an image is made of",
    "CONTRIBUTING.md": "how to change this project",
    "LICENSE": "Apache-2.0",
    "Makefile": "every command; `make` alone lists them",
    "README.md": "this page",
    "bench": "measurements, each against a peer in the same run",
    "bench/operator": "the operator beside plain Jobs, on a real control plane",
    "charts": "what helm installs",
    "charts/cptjob-operator": "the operator's chart; its values come from the types",
    "client": "for a person or a script",
    "client/cptjob": "the command `cptjob`",
    "crds": "the resource that a manifest describes",
    "crds/cptjob_api": "the API as types: fields, defaults, checks",
    "deploy": "what is applied to a cluster",
    "deploy/Containerfile.operator": "the operator's image",
    "deploy/Containerfile.trainer": "the trainer's image",
    "deploy/argocd": "how Argo CD judges a job, and jobs from a repository",
    "deploy/examples": "manifests to start from",
    "deploy/flux": "jobs from a repository, and how Flux judges them",
    "deploy/operator.yaml": "the operator without helm, rendered from the chart",
    "deploy/storage": "volume claims that the examples name",
    "docs": "for readers",
    "docs/decisions": "what was decided, and why",
    "operator": "what runs once in a cluster",
    "operator/cptjob_operator": "the operator: observe, plan, apply",
    "operator/cptjob_operator/edge": "the API server and the coordinators; all I/O is here",
    "operator/cptjob_operator/objects": "a job's pods and what stands beside them, as manifests",
    "operator/cptjob_operator/plan": "what a job needs now: rules, and what they look at; no I/O",
    "pyproject.toml": "one project: extras, tools, who may import whom",
    "requirements": "what is installed, locked with hashes: run, dev, bench, operator, assets, go, uv",
    "tests": "by subject",
    "tests/api": "types, manifests, generated files",
    "tests/chart": "the chart in helm's hands on a real API server, its judges, the guide",
    "tests/checkpoints": "saving, resuming, death at every point",
    "tests/cluster": "the operator on a real control plane",
    "tests/client": "the command line, as a person uses it",
    "tests/data": "documents, tokens, rows, mixing",
    "tests/end_to_end": "`cptjob run` with all of its processes, also killed at random",
    "tests/house": "locks, README, examples, dependencies",
    "tests/node": "jobs train on real nodes: kubelet, containerd, the project's images",
    "tests/operator": "what the operator decides, and what its settings allow",
    "tests/report": "the page: what it tells, what it keeps out, unfinished runs",
    "tests/run": "coordinator, launcher, stopping, restarts",
    "tests/trainer": "architectures, loss, schedule, the step",
    "trainer": "what runs in a job's pods",
    "trainer/cptjob_trainer": "the trainer: its configuration, and what its packages share",
    "trainer/cptjob_trainer/checkpoint": "checkpoints: saved whole, verified, continued or refused",
    "trainer/cptjob_trainer/data": "from documents to prepared rows, and which row comes when",
    "trainer/cptjob_trainer/model": "a model directory, and what is done to a model to train it well",
    "trainer/cptjob_trainer/results": "what a run leaves: model, manifest, report, exports",
    "trainer/cptjob_trainer/run": "the processes: coordinator, launcher with its agent, workers",
    "trainer/cptjob_trainer/training": "the loop, its parts, and what it says while it runs",
    "trainer/cptjob_trainer/results/report.html": "the page that report.py fills in",
}
# Folders whose contents are not worth a line each.
CLOSED = {"requirements"}
# Not part of the story.
HIDDEN = {".gitignore"}


def block() -> str:
    """What stands between START and END. Raises ValueError for an entry that has no line."""
    rows = list(entries())
    folders = [row for row in rows if row[0].endswith("/")]
    return (
        f"```\n{lines(folders)}```\n\n"
        f"<details><summary>Every file, with a line each</summary>\n\n```\n{lines(rows)}```\n\n"
        "</details>\n"
    )


def lines(rows: Iterable[tuple[str, str]]) -> str:
    """(indented name, what it is) as text, one entry a line."""
    return "".join(f"{name:<{COLUMN}} {what}".rstrip() + "\n" for name, what in rows)


def entries() -> Iterator[tuple[str, str]]:
    """(indented name, what it is) for each entry in the order of the tree."""
    for path in sorted(shown(), key=lambda path: path.parts):
        folder = (ROOT / path).is_dir()
        indent = "    " * (len(path.parts) - 1)
        yield indent + path.name + ("/" if folder else ""), about(path)


def shown() -> set[PurePosixPath]:
    paths: set[PurePosixPath] = set()
    for file in files():
        parts = file.parts
        depth = 1 if parts[0] in CLOSED else 2
        while "/".join(parts[:depth]) in PACKAGES:
            depth += 1
        paths.update(PurePosixPath(*parts[:n]) for n in range(1, min(depth, len(parts)) + 1))
    return {path for path in paths if path.name != "__init__.py" and str(path) not in HIDDEN}


def files() -> list[PurePosixPath]:
    """Files that belong to the project, new ones included."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [PurePosixPath(name) for name in listing.split("\0") if name and (ROOT / name).exists()]


def about(path: PurePosixPath) -> str:
    """What an entry is, in a few words."""
    if str(path) in LINES:
        return LINES[str(path)]
    file = ROOT / path
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        if docstring:
            return docstring.split("\n\n")[0].replace("\n", " ").split(": `")[0].rstrip(".")
    if path.suffix == ".md":
        title = re.search(r"^# (.+)", file.read_text("utf-8"), re.MULTILINE)
        if title:
            return title[1]
    if path.suffix == ".yaml" and path.parts[0] == "crds":
        return "the CustomResourceDefinition, generated from the types"
    if file.is_dir() and path.parent.as_posix() in PACKAGES:
        return "" if not (file / "__init__.py").exists() else about(path / "__init__.py")
    raise ValueError(f"{path} has no line in the README's tree: give it one in docs/tree.py")


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    try:
        wanted = f"{before}{START}{block()}{END}{after}"
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if wanted == text:
        return 0
    if "--check" in sys.argv[1:]:
        print("error: the tree in README.md is not what is there; `make generate` writes it")
        return 1
    readme.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
