"""docs/cluster.md as something that can be run: its commands, what they print, and files to write.

A block ```console holds commands after `$ `, each with what it prints below it; `...` stands for
anything, alone on a line for any lines. Times, addresses and the random parts of names may differ.
A block ```yaml whose first line is `# NAME.yaml` is a file that later commands use. A comment
`<!-- test: WORDS -->` is for the test: what a cluster does that no command of the reader brings about.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^```(?P<kind>console|yaml)\n(?P<text>.*?)^```$|^<!-- test: (?P<words>.*?) -->$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# (\S+\.yaml)\n")
_VARIES = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\b\d+\.\d+\.\d+\.\d+\b", "ADDRESS"),
    (r"(?<=-)[0-9a-f]{5}(?![0-9a-z])", "UID"),
    (r"(?<=-)[0-9a-z]{8,10}-[0-9a-z]{5}\b", "RANDOM"),
    (r"\b(\d+[smhd])+\b", "AGE"),
    (r" +", " "),
)


@dataclass(frozen=True)
class Command:
    """A command of the reader, and what it prints."""

    line: int
    text: str
    output: str


@dataclass(frozen=True)
class File:
    """A file that the reader writes."""

    name: str
    text: str


@dataclass(frozen=True)
class Happening:
    """What the test does."""

    words: tuple[str, ...]


def steps(page: Path) -> Iterator[Command | File | Happening]:
    """Everything to do, in the order of the page."""
    text = page.read_text("utf-8")
    for found in _BLOCK.finditer(text):
        if found["words"]:
            yield Happening(tuple(found["words"].split()))
        elif found["kind"] == "console":
            yield from _commands(found["text"], text.count("\n", 0, found.start("text")) + 1)
        elif named := _FILE.match(found["text"]):
            yield File(named[1], found["text"])


def _commands(text: str, line: int) -> Iterator[Command]:
    command, output, start = "", "", line
    for number, each in enumerate(text.splitlines(keepends=True), start=line):
        if each.startswith("$ "):
            if command:
                yield Command(start, command, output)
            command, output, start = each[2:], "", number
        elif command.endswith("\\\n"):
            command += each
        else:
            output += each
    if command:
        yield Command(start, command, output)


def matches(told: str, printed: str) -> bool:
    """Whether a command printed what the page tells."""
    pattern = re.escape(_plain(told))
    pattern = re.sub(r"^\\\.\\\.\\\.\\\n", r"(?:.*\\n)*?", pattern, flags=re.MULTILINE)
    pattern = pattern.replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, _plain(printed)) is not None


def _plain(text: str) -> str:
    plain = "".join(f"{line.rstrip()}\n" for line in text.strip().splitlines())
    for pattern, word in _VARIES:
        plain = re.sub(pattern, word, plain)
    return plain
