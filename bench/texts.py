"""Real English text for the benchmarks, from what is installed. Imported by them."""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import orjson

ROOT = Path(__file__).resolve().parent.parent

# Docstrings are read until there are this many bytes of them.
_DOCSTRINGS = 12_000_000


def _documents() -> Iterator[str]:
    """The language reference, the demo's texts where they were made, docstrings."""
    yield from topics.topics.values()
    for path in sorted((ROOT / "volumes" / "data").rglob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            yield orjson.loads(line)["text"]
    left = _DOCSTRINGS
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    for path in (path for place in places for path in sorted(place.rglob("*.py"))):
        if left < 0:
            return
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError):
            continue
        found = [
            text
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            and len(text := ast.get_docstring(node) or "") > 200
        ]
        if found:
            yield "\n\n".join(found)
            left -= sum(map(len, found))


def _passages(document: str) -> Iterator[str]:
    """A few paragraphs each."""
    paragraphs = re.split(r"(?<=\n)\n+", document)
    for start in range(0, len(paragraphs), 4):
        passage = "\n".join(paragraphs[start : start + 4])
        if len(passage) > 100:
            yield passage


def write(path: Path, size: int) -> int:
    """Write documents of shuffled passages to `path`, `size` bytes; returns the distinct bytes."""
    ordered = sorted({passage for document in _documents() for passage in _passages(document)})
    chance = random.Random(0)
    written = 0
    queue: list[str] = []
    with path.open("wb") as file:
        while written < size:
            if len(queue) < 8:
                again = ordered.copy()
                chance.shuffle(again)
                queue += again
            count = chance.choice((1, 1, 2, 3, 8))
            text = "\n\n".join(queue.pop() for _ in range(count))
            line = orjson.dumps({"text": text}) + b"\n"
            file.write(line)
            written += len(line)
    return min(written, sum(len(passage.encode()) for passage in ordered))
