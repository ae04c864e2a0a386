"""Outputs of runs that never were, with the files that a report reads."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Run:
    """A run of 200 steps in `out`, changed by a test before `write`."""

    out: Path
    name: str = "small"
    model: str = "pvc://models/small"
    sources: Mapping[str, str] = field(
        default_factory=lambda: {"python": "Domain", "shakespeare": "General"}
    )
    total: int = 200
    done: int = 200
    skipped: frozenset[int] = frozenset()
    evaluate_every: int = 50

    @property
    def base(self) -> dict[str, float]:
        losses = {"Domain": 4.0, "General": 3.0}
        return {role: losses[role] for role in losses if role in self.sources.values()}

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "role": role, "documents": 10, "tokens": 4096, "rows": 8, "weight": None}
            for name, role in self.sources.items()
        ]

    @property
    def quotas(self) -> list[int]:
        return [800 // (at + 1) for at in range(len(self.sources))]

    def heldout(self, step: int) -> dict[str, float]:
        """Domain text is learnt (down by 0.5 at most) and general text forgotten (up by 0.25)."""
        values = {}
        for role, change in (("Domain", -0.5), ("General", 0.25)):
            if role in self.base:
                key = f"heldout_{role.lower()}_loss"
                values[f"{key}_change"] = change * step / self.total
                values[key] = self.base[role] + change * step / self.total
        for name, role in self.sources.items():
            values[f"heldout/{name}"] = values[f"heldout_{role.lower()}_loss"]
        return values

    def step(self, step: int) -> dict[str, Any]:
        tokens = {name: 2048 // (at + 1) for at, name in enumerate(self.sources)}
        line: dict[str, Any] = {
            "step": step,
            "loss": 4.0 - step / self.total + 0.1 * math.sin(step),
            "learningRate": 2e-5 * min(1.0, step / 10),
            "gradNorm": 1.0 + 0.2 * math.cos(step),
            "tokens": sum(tokens.values()),
            "tokensBySource": tokens,
            "tokensPerSecond": 9000.0 + step % 7,
            "seconds": 0.25,
            "dataWait": 0.01,
            "padding": 0.005,
            "mfu": None,
        }
        if step in self.skipped:
            line |= {"skipped": True, "gradNorm": None, "loss": math.nan}
        return line

    def manifest(self) -> dict[str, Any]:
        bases = {f"heldout_{role.lower()}_loss_base": loss for role, loss in self.base.items()}
        tokens = [self.step(step)["tokensBySource"] for step in range(1, self.done + 1)]
        by_source = {name: sum(line[name] for line in tokens) for name in self.sources}
        return {
            "version": 1,
            "jobName": self.name,
            "digest": "feedbeef",
            "parentModel": {"uri": self.model, "fingerprint": "f"},
            "data": {
                "prepared": "0123abcd",
                "sources": [
                    entry | {"quota": quota}
                    for entry, quota in zip(self.entries, self.quotas, strict=True)
                ],
            },
            "settings": {"method": "Full", "learningRate": 2e-5, "schedule": {"type": "Cosine"}},
            "totalSteps": self.total,
            "steps": self.done,
            "tokens": sum(by_source.values()),
            "tokensBySource": by_source,
            "trainingSeconds": 52.0,
            "evaluationSeconds": 2.5,
            "metrics": {**bases, **self.heldout(self.done)},
            "completionTime": "2026-01-02T03:04:05+00:00",
            "processes": 2,
            "software": {"python": "3.11.7", "torch": "2.15.0"},
        }

    def write(self) -> Path:
        """The files of a run that has not written its manifest."""
        prepared = self.out / "prepared" / "0123abcd"
        prepared.mkdir(parents=True)
        value = {"totalSteps": self.total, "quotas": self.quotas, "sources": self.entries}
        (prepared / "prepared.json").write_text(json.dumps(value))
        by_source = {name: self.base[role] for name, role in self.sources.items()}
        bases = {"byRole": self.base, "bySource": by_source, "tokens": 1000}
        (prepared / "base-losses.json").write_text(json.dumps(bases))
        logs = self.out / "logs" / "small-20260102-030405"
        logs.mkdir(parents=True)
        config = {"name": self.name, "model": {"uri": self.model}, "training": {"method": "Full"}}
        (logs / "config.json").write_text(json.dumps(config))
        with (self.out / "metrics.jsonl").open("w") as file:
            for step in range(1, self.done + 1):
                file.write(json.dumps(self.step(step)) + "\n")
                if step % self.evaluate_every == 0:
                    line = {"step": step, "evaluation": self.heldout(step)}
                    file.write(json.dumps(line) + "\n")
        return self.out


class Page(HTMLParser):
    """A parsed report: its elements, the words of the page, of its plots' titles and of its drawings.

    An element that is not closed, or closed twice, fails the test.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.drawings: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag == "svg":
            self.drawings.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open or not data.strip():
            return
        if "svg" in self._open:
            self.drawings[-1] += f"{data} "
        else:
            if "h3" in self._open:
                self.titles.append(data)
            self.words.append(data.strip().replace("\N{NO-BREAK SPACE}", " "))

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def attributes(self, name: str) -> list[str]:
        """Values of an attribute, over all elements."""
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out")


@pytest.fixture
def page() -> Callable[[Path], Page]:
    return Page
