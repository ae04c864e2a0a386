"""bench/RESULTS.md: one section per benchmark, replaced in place. Imported by the benchmarks.

python bench/results.py     how often what was measured has changed since, section by section
"""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "bench" / "RESULTS.md"
HEAD = """# Results

Written by the files in `bench/`. Each figure stands beside that of a peer which ran on the same
machine in turn with it. A section is only as new as the commit that it names;
`python bench/results.py` counts the changes since.
"""
# The line of a section that names what was measured.
FILES = "Measured: "


def machine() -> str:
    """Processor, cores and memory, in words."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", info)
    memory = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    size = re.search(r"MemTotal:\s*(\d+) kB", memory)
    import os

    parts = [found.group(1).strip() if found else platform.machine(), f"{os.cpu_count()} cores"]
    if size:
        parts.append(f"{int(size.group(1)) / 2**20:.0f} GiB")
    parts.append(f"Python {platform.python_version()}")
    return ", ".join(parts)


def _git(*arguments: str) -> str | None:
    """What git prints; None when it fails."""
    ended = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ended.stdout.strip() if ended.returncode == 0 else None


def commit() -> str:
    """The commit that ran, and whether files differed from it."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/RESULTS.md")
    return (_git("rev-parse", "--short=12", "HEAD") or "unknown") + (
        ", with changes" if changed else ""
    )


def trainer(names: str) -> list[str]:
    """The paths of these modules of the trainer."""
    return [f"trainer/cptjob_trainer/{name}.py" for name in names.split()]


def write(section: str, body: str, files: Sequence[str], command: str = "") -> None:
    """Replace the section named `section`, or add it. Sections stand in order of their names.

    `files` are those whose change would make the figures old; `command` is what ran, by default
    the benchmark that runs.
    """
    script = shlex.join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    command = command or f"python {script}"
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    head = f"{day} · commit {commit()} · `{command}` · {machine()}"
    measured = FILES + ", ".join(f"`{file}`" for file in files)
    known = sections(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[section] = f"{head}\n\n{body.strip()}\n\n{measured}\n"
    parts = [HEAD] + [f"## {name}\n\n{known[name].strip()}\n" for name in sorted(known)]
    FILE.write_text("\n".join(parts), encoding="utf-8")


def age(section: str) -> Iterator[str]:
    """For each commit that a section names: how many later ones have changed what it measured."""
    line = next((line for line in section.splitlines() if line.startswith(FILES)), "")
    files = re.findall(r"`([^`]+)`", line)
    if not files:
        yield "does not say what it measured"
        return
    for name in dict.fromkeys(re.findall(r"\bcommit ([0-9a-f]{7,40})\b", section)):
        since = _git("log", "--oneline", f"{name}..", "--", *files)
        if since is None:
            yield f"{name} is no commit of this repository"
        else:
            yield f"changed {len(since.splitlines())} times since {name}"


def main() -> None:
    """Print the age of each section."""
    for name, section in sections(FILE.read_text(encoding="utf-8")).items():
        print(f"{name}: {'; '.join(age(section))}")


def sections(text: str) -> dict[str, str]:
    """The sections of RESULTS.md by their names."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {name.strip(): body for name, body in zip(parts[::2], parts[1::2], strict=True)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
