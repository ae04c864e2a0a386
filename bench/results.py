"""bench/RESULTS.md: one section per benchmark, replaced in place. Imported by the benchmarks."""

import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "bench" / "RESULTS.md"
HEAD = """# Results

Written by the files in `bench/`. Each figure stands beside that of a peer which ran on the same
machine in turn with it. A section is only as new as the commit that it names.
"""


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


def commit() -> str:
    """The commit that ran, and whether files differed from it."""

    def git(*arguments: str) -> str:
        ended = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return ended.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/RESULTS.md")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (
        ", with changes" if changed else ""
    )


def write(section: str, body: str) -> None:
    """Replace the section named `section`, or add it. Sections stand in order of their names."""
    command = "python " + shlex.join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    text = f"{day} · commit {commit()} · `{command}` · {machine()}\n\n{body.strip()}\n"
    sections = _sections(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    sections[section] = text
    parts = [HEAD] + [f"## {name}\n\n{sections[name].strip()}\n" for name in sorted(sections)]
    FILE.write_text("\n".join(parts), encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return {name.strip(): body for name, body in zip(parts[::2], parts[1::2], strict=True)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
